"""Signed envelopes and the keyset that says whose signature counts. The only importer of nacl."""

from tether.envelope.frame import (
    DOMAIN,
    MAGIC,
    MAX_HEADER,
    REPLAY_WINDOW_MS,
    VERSION,
    Envelope,
    Header,
    Signer,
    Verifier,
)
from tether.envelope.historical import Historical, body_of, kid_of, open_old_keyset
from tether.envelope.keyset import (
    KEYSET_DOMAIN,
    MAX_SKEW_MS,
    Identity,
    IdentityRecord,
    Keyset,
    Revocation,
    key_id,
    new_identity,
    open_keyset,
    root_public_key,
    sign_keyset,
)
from tether.envelope.roles import ROLE_TYPES, MessageType, Role
from tether.envelope.rootkey import is_locked, lock_root_key, unlock_root_key
from tether.envelope.session import SESSION_DOMAIN, SESSION_PREFIX, Session, issue_session, open_session

__all__ = [
    "DOMAIN",
    "KEYSET_DOMAIN",
    "MAGIC",
    "MAX_HEADER",
    "MAX_SKEW_MS",
    "REPLAY_WINDOW_MS",
    "ROLE_TYPES",
    "SESSION_DOMAIN",
    "SESSION_PREFIX",
    "VERSION",
    "Envelope",
    "Header",
    "Historical",
    "Identity",
    "IdentityRecord",
    "Keyset",
    "MessageType",
    "Revocation",
    "Role",
    "Session",
    "Signer",
    "Verifier",
    "body_of",
    "is_locked",
    "issue_session",
    "key_id",
    "kid_of",
    "lock_root_key",
    "new_identity",
    "open_keyset",
    "open_old_keyset",
    "open_session",
    "root_public_key",
    "sign_keyset",
    "unlock_root_key",
]
