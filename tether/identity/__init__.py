"""Identities: keys, certificates, and the keyset that an administrator edits."""
