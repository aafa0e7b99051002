"""Roles of identities, types of messages, and the types that each role may send."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Role(StrEnum):
    GATEWAY = "gateway"
    DISPATCHER = "dispatcher"
    WORKER = "worker"
    MODELSTORE = "modelstore"
    ADMIN = "admin"


class MessageType(StrEnum):
    """Type of a message, which selects the receiver's action. A key may send only the types of its role."""

    INFER = "infer"  # bundle on an infer lane
    JOB = "job"  # bundle on a jobs lane
    ANSWER = "answer"  # reply bundle to a gateway
    RESULT = "result"  # outcome of a durable job
    RECORD = "record"  # state record of an accepted job
    ATTEMPT = "attempt"  # note that a worker started
    DEAD = "dead"  # dead letter with the original frame inside
    HEARTBEAT = "heartbeat"
    REGISTER = "register"  # worker to dispatcher, RPC
    REGISTERED = "registered"  # its answer
    ASSIGN = "assign"
    ROUTE = "route"
    MANIFEST = "manifest"
    ALIAS = "alias"
    CONFIG = "config"  # serving configuration of a model
    LEASE = "lease"  # lease of a partition, or heartbeat of a model store
    API_KEY = "api_key"
    PUSH = "push"  # gateway to model store, RPC: make a version of these chunks
    PUSHED = "pushed"  # its answer
    CHANGE = "change"  # gateway to model store, RPC: move an alias, delete a version
    CHANGED = "changed"  # its answer
    WANTED = "wanted"  # model store to worker: request for a chunk that the store has lost
    CHUNK = "piece"  # its answer
    TENANT = "tenant"  # a tenant's limits and rights
    TENANT_KEY = "tenant_key"  # a tenant's data key, encrypted for the entitled identities
    MODEL_KEY = "model_key"  # an encrypted model's data key, likewise
    KEY_USE = "key_use"  # last use of an API key
    DEMAND = "demand"  # gateway to gateways: usage per key, for limits over all gateways together
    AUDIT = "audit"  # entries of the audit log


ROLE_TYPES: Mapping[Role, frozenset[MessageType]] = {
    Role.GATEWAY: frozenset(
        {
            MessageType.INFER,
            MessageType.JOB,
            MessageType.RECORD,
            MessageType.RESULT,
            MessageType.API_KEY,
            MessageType.PUSH,
            MessageType.CHANGE,
            MessageType.TENANT,
            MessageType.TENANT_KEY,
            MessageType.KEY_USE,
            MessageType.DEMAND,
            MessageType.AUDIT,
        }
    ),
    Role.DISPATCHER: frozenset(
        {MessageType.REGISTERED, MessageType.ASSIGN, MessageType.ROUTE, MessageType.RESULT, MessageType.AUDIT}
    ),
    Role.WORKER: frozenset(
        {
            MessageType.ANSWER,
            MessageType.RESULT,
            MessageType.ATTEMPT,
            MessageType.DEAD,
            MessageType.HEARTBEAT,
            MessageType.REGISTER,
            MessageType.CHUNK,
        }
    ),
    Role.MODELSTORE: frozenset(
        {
            MessageType.MANIFEST,
            MessageType.ALIAS,
            MessageType.CONFIG,
            MessageType.MODEL_KEY,
            MessageType.LEASE,
            MessageType.WANTED,
            MessageType.PUSHED,
            MessageType.CHANGED,
            MessageType.AUDIT,
        }
    ),
    Role.ADMIN: frozenset({MessageType.API_KEY, MessageType.TENANT, MessageType.AUDIT}),
}
"""Types each role may send. RESULT from a gateway ends a cancelled or expired job, and tells workers that the
caller of an infer lane's job is gone; from the dispatcher it ends a lost job.
"""
