"""Random damage to a file whose header has so many bytes."""

import struct
from collections.abc import Callable

from hypothesis import strategies as st

Damage = Callable[[bytes], bytes]

_numbers = st.sampled_from([0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1])
_integers = st.sampled_from("BIQ").flatmap(
    lambda code: (_numbers | st.integers(0, 300)).map(
        lambda n: struct.pack(f"<{code}", n % 256 ** struct.calcsize(code))
    )
)


@st.composite
def damages(draw: st.DrawFn, header: int) -> Damage:
    """Overwrite, insert, delete, repeat or cut."""
    kind, at, size = draw(st.integers(0, 4)), draw(st.integers(0, header)), draw(st.integers(1, 64))
    new = draw(_integers | st.binary(min_size=1, max_size=24))

    def damage(data: bytes) -> bytes:
        return [
            data[:at] + new + data[at + len(new) :],
            data[:at] + new + data[at:],
            data[:at] + data[at + size :],
            data[: at + size] + data[at:],
            data[:at],
        ][kind]

    return damage
