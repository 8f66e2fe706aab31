"""The naive reference: fat rows by the definition, in plain Python. Shares no code with the product.

A history is one user's events ordered by (available_at, event_id). The sequence of an example is
the history's events available strictly before its request, the newest `max_length` of them, oldest
first. A request that names an event is made at the instant when that event became available.
"""

from bisect import bisect_left

Event = dict  # user_id, event_id, available_at (UTC microseconds), and traits
Request = dict  # user_id, and either request_time (UTC microseconds) or event_id


def histories(events: list[Event]) -> dict[object, list[Event]]:
    """Every user's whole history, oldest first."""
    found: dict[object, list[Event]] = {}
    for event in events:
        found.setdefault(event["user_id"], []).append(event)
    for history in found.values():
        history.sort(key=lambda event: (event["available_at"], event["event_id"]))
    return found


def fat_rows(
    events: list[Event], requests: list[Request], max_length: int | None = None
) -> list[dict]:
    """Each request with its `request_time`, `end_position` and whole `sequence` of events."""
    of_user = histories(events)
    times = {user: [e["available_at"] for e in history] for user, history in of_user.items()}
    made_at = {(e["user_id"], e["event_id"]): e["available_at"] for e in events}
    rows = []
    for request in requests:
        user = request["user_id"]
        time = request.get("request_time")
        if time is None:
            time = made_at[user, request["event_id"]]
        end = bisect_left(times.get(user, []), time)
        start = 0 if max_length is None else max(end - max_length, 0)
        sequence = of_user.get(user, [])[start:end]
        rows.append({**request, "request_time": time, "end_position": end, "sequence": sequence})
    return rows


# -- the hashes of the format, one value at a time ------------------------------------------------

MASK = (1 << 64) - 1


def mix64(x: int) -> int:
    """SplitMix64's finalizer."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def id_word(value: int | str) -> int:
    """An integer itself, modulo 2^64; a string by its length and its UTF-8 bytes, 8 at a time."""
    if isinstance(value, int):
        return value & MASK
    raw = value.encode()
    word = mix64(len(raw))
    for at in range(0, len(raw), 8):
        word = mix64(word ^ int.from_bytes(raw[at : at + 8], "little"))
    return word


def checksum(event_ids: list[int | str], first_position: int) -> int:
    """A pointer's checksum, as the signed integer that is stored."""
    total = 0
    for position, event_id in enumerate(event_ids, first_position):
        total += mix64(mix64(id_word(event_id)) ^ ((position + 1) * 0x9E3779B97F4A7C15 & MASK))
    total &= MASK
    return total - (1 << 64) if total >> 63 else total


def bucket(user_id: int | str, num_buckets: int) -> int:
    """The bucket of a user, as the documentation of `bucket_of` defines it."""
    if isinstance(user_id, str):
        import hashlib

        word = int.from_bytes(hashlib.md5(user_id.encode()).digest()[:8], "little")
    else:
        word = user_id & MASK
    low, high, mask = word & 0xFFFFFFFF, word >> 32, 0xFFFFFFFF
    x = low ^ (high * 0x85EBCA6B & mask)
    x ^= x >> 16
    x = x * 0x85EBCA6B & mask
    x ^= x >> 13
    x = x * 0xC2B2AE35 & mask
    x ^= x >> 16
    return x % num_buckets
