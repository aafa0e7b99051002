"""The sample of a push, which is stored as a file of the version."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

from tether.domain.manifest import ModelFile
from tether.errors import InvalidRequest, PayloadTooLarge
from tether.gateway_http.api.route_spec import Header, RequestContext
from tether.gateway_http.models.encrypted_models import PushTarget
from tether.model import sample
from tether.storage.upload import upload

SAMPLE_LENGTH = Header(
    "x-tether-sample-length",
    "Length in bytes of a sample at the start of the body: JSON, `{name: [...]}` or "
    '`{"inputs": [tensors]}`. The model file follows.',
)


def sample_length(call: RequestContext) -> int:
    """Return the length of the sample at the start of the body in bytes; 0 if there is none.

    Raises:
        InvalidRequest: the header is not a positive number.
        PayloadTooLarge: the sample is too large.
    """
    text = call.request.headers.get(SAMPLE_LENGTH.name)
    if text is None:
        return 0
    if not text.isdecimal() or not text.isascii() or not text.strip("0"):
        raise InvalidRequest(f"{SAMPLE_LENGTH.name} must be a number of bytes above 0", field=SAMPLE_LENGTH.name)
    if len(text) > 9 or int(text) > sample.LARGEST:
        raise PayloadTooLarge(f"a sample must have at most {sample.LARGEST} bytes", field=SAMPLE_LENGTH.name)
    return int(text)


async def keep_sample(call: RequestContext, name: str, content: AsyncIterator[bytes], target: PushTarget) -> ModelFile:
    """Store a sample; the model store reads it during inspection."""
    gateway, store = call.gateway, target.store
    tenant = gateway.tenants.get(call.tenant)
    counted = partial(gateway.unreferenced_chunks.counted, tenant, store.bucket, frozenset())
    known = gateway.chunk_possession.readable(call.caller, name)
    file, _ = await upload(
        gateway.bus, store, content, limit=sample.LARGEST, path=sample.PATH, counted=counted, whole=True, known=known
    )
    return file


class SplitBody:
    """Splits a body into two parts, read one after the other."""

    def __init__(self, parts: AsyncIterator[bytes], length: int) -> None:
        self._parts = parts
        self._length = length
        self._over = b""

    async def first(self) -> AsyncIterator[bytes]:
        """Yield the first ``length`` bytes.

        Raises:
            InvalidRequest: there are fewer.
        """
        left = self._length
        while left:
            part = await anext(self._parts, None)
            if part is None:
                raise InvalidRequest(
                    f"the body ends within the sample: {SAMPLE_LENGTH.name} is {self._length}, "
                    f"{left} bytes are missing",
                    field=SAMPLE_LENGTH.name,
                )
            yield part[:left]
            self._over = part[left:]
            left -= min(left, len(part))

    async def rest(self) -> AsyncIterator[bytes]:
        """Yield the remaining bytes."""
        if self._over:
            yield self._over
        async for part in self._parts:
            yield part
