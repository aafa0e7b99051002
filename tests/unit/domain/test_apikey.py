"""API keys can be recognised by their id and never rebuilt from what is stored."""

from __future__ import annotations

import msgspec

from tether.domain.api_key import ApiKey, key_id, new_key_text, stored_key
from tether.wire import codec


def made() -> tuple[str, ApiKey]:
    text = new_key_text()
    return text, stored_key(text, tenant="acme", scopes=("infer",), name="ci", created_at=1.0)


def test_a_key_is_accepted_and_no_other_is() -> None:
    text, key = made()
    assert key.accepts(text)
    assert not key.accepts(new_key_text())
    assert key_id(text) == key.id


def test_what_is_stored_does_not_hold_the_secret() -> None:
    text, key = made()
    assert text.encode()[12:] not in codec.encode(key)
    assert codec.decode(codec.encode(key), ApiKey) == key


def test_a_revoked_key_is_refused() -> None:
    text, key = made()
    assert not msgspec.structs.replace(key, revoked=True).accepts(text)


def test_admin_implies_every_scope() -> None:
    _, key = made()
    assert key.allows("infer")
    assert not key.allows("admin")
    assert msgspec.structs.replace(key, scopes=("admin",)).allows("models:write")


def test_text_of_another_form_has_no_id() -> None:
    text = new_key_text()
    for wrong in ("", "tk_", text + "x", text.upper(), text.replace("_", "-"), text[:-1] + "\n"):
        assert key_id(wrong) is None
