"""Says why a contender has no figures."""

from dataclasses import dataclass

INTERRUPTED, NO_SUCH_OPERATION = "interrupted", "no such operation"


@dataclass(frozen=True)
class LeftOut:
    why: str  # a few words for the table
    detail: str = ""  # a sentence for below the table, where there is more to say
    more_than_s: float | None = None  # one call was stopped after this time


def too_slow(limit_s: float, phase: str, calls: int) -> LeftOut:
    """For a contender that was stopped ``limit_s`` seconds after it began so many calls (0: it was being prepared)."""
    detail = f"its {phase} was stopped after {limit_s:g} s"
    if calls == 1:
        return LeftOut(f"> {limit_s:g} s", detail, limit_s)
    return LeftOut("stopped" if calls else f"prepares > {limit_s:g} s", detail)


def of_error(error: Exception) -> LeftOut:
    """For a contender that raised ``error``."""
    text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if isinstance(error, ImportError):
        return LeftOut("not installed", f"{text} (pip install '.[bench]' in the checkout)")
    if isinstance(error, NotImplementedError):  # torch's dispatcher raises it where a device has no kernel
        return LeftOut("not on this device", text)
    if isinstance(error, MemoryError) or "memory" in str(error) and "alloc" in str(error):
        return LeftOut("out of memory", text)
    return LeftOut("failed", text)
