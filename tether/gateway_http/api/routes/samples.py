"""The sample of a push, which becomes a file of the version."""

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
    'Bytes of a sample that the body begins with: JSON, `{name: [...]}` or `{"inputs": [tensors]}`. The model file follows.',
)


def sample_length(call: RequestContext) -> int:
    """How many bytes of a model file's body are its sample; 0: there is none.

    Raises:
        InvalidRequest: the header is no number above 0.
        PayloadTooLarge: a sample may not have so many.
    """
    text = call.request.headers.get(SAMPLE_LENGTH.name)
    if text is None:
        return 0
    if not text.isdecimal() or not text.isascii() or not text.strip("0"):
        raise InvalidRequest(f"{SAMPLE_LENGTH.name} must be a number of bytes above 0", field=SAMPLE_LENGTH.name)
    if len(text) > 9 or int(text) > sample.LARGEST:
        raise PayloadTooLarge(f"a sample has at most {sample.LARGEST} bytes", field=SAMPLE_LENGTH.name)
    return int(text)


async def keep_sample(call: RequestContext, name: str, content: AsyncIterator[bytes], target: PushTarget) -> ModelFile:
    """Store a sample. The model store reads it when it looks at the version."""
    gateway, store = call.gateway, target.store
    tenant = gateway.tenants.get(call.tenant)
    counted = partial(gateway.unreferenced_chunks.counted, tenant, store.bucket, frozenset())
    known = gateway.chunk_possession.readable(call.caller, name)
    file, _ = await upload(
        gateway.bus, store, content, limit=sample.LARGEST, path=sample.PATH, counted=counted, whole=True, known=known
    )
    return file


class SplitBody:
    """A body that is read in two parts, one after the other."""

    def __init__(self, parts: AsyncIterator[bytes], length: int) -> None:
        self._parts = parts
        self._length = length
        self._over = b""

    async def first(self) -> AsyncIterator[bytes]:
        """The first ``length`` bytes.

        Raises:
            InvalidRequest: there are fewer.
        """
        left = self._length
        while left:
            part = await anext(self._parts, None)
            if part is None:
                raise InvalidRequest(
                    f"the body ends within the sample: {SAMPLE_LENGTH.name} says {self._length} bytes, {left} are missing",
                    field=SAMPLE_LENGTH.name,
                )
            yield part[:left]
            self._over = part[left:]
            left -= min(left, len(part))

    async def rest(self) -> AsyncIterator[bytes]:
        """What follows."""
        if self._over:
            yield self._over
        async for part in self._parts:
            yield part
