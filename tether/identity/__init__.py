"""Identities: keys, certificates, and edits of the keyset by an administrator."""
