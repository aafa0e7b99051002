"""Who may say what: the roles of identities, the types of messages, and which role may send which type."""

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
    """What a message asks its receiver to do. A key may send only the types of its role."""

    INFER = "infer"  # bundle on an infer lane
    JOB = "job"  # bundle on a jobs lane
    ANSWER = "answer"  # reply bundle to a gateway
    RESULT = "result"  # how a durable job ended
    RECORD = "record"  # state record of an accepted job
    ATTEMPT = "attempt"  # note that a worker began
    DEAD = "dead"  # dead letter with the original frame inside
    HEARTBEAT = "heartbeat"
    REGISTER = "register"  # worker to dispatcher, RPC
    REGISTERED = "registered"  # its answer
    ASSIGN = "assign"
    ROUTE = "route"
    MANIFEST = "manifest"
    ALIAS = "alias"
    CONFIG = "config"  # how a model is served
    LEASE = "lease"  # which model store looks after a partition, and that it lives
    API_KEY = "api_key"
    PUSH = "push"  # gateway to model store, RPC: make these chunks a version
    PUSHED = "pushed"  # its answer
    CHANGE = "change"  # gateway to model store, RPC: move an alias, delete a version
    CHANGED = "changed"  # its answer
    WANTED = "wanted"  # model store to worker: a chunk that the store has lost
    CHUNK = "piece"  # its answer
    TENANT = "tenant"  # a tenant's limits and what it may see
    TENANT_KEY = "tenant_key"  # a tenant's data key, sealed to the identities that are entitled to it
    MODEL_KEY = "model_key"  # an encrypted model's data key, likewise
    KEY_USE = "key_use"  # when an API key was last used
    DEMAND = "demand"  # gateway to gateways: what each key asked of it, so that limits hold for all of them together
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
"""The types each role may send. RESULT from a gateway is how a cancelled or expired job ends, and how it tells workers that
nobody waits for a job of an infer lane any more; from the dispatcher how a lost job ends."""
