"""The order of names, as numbers: `heads.place`, which is also the row in `search`.

Invariant: of two names the one that sorts first has the smaller place. A new name takes one between its
neighbours'; where there is none left, as few of those around it as will do are spread out again (Bender et
al., "Two simplified algorithms for maintaining order in a list", 2002: the smallest range around it that is
not too crowded for its size).
"""

from registry.writer import Writer

END, STEP = 1 << 62, 1 << 36
"""Places are above 0 and below END; a name before or behind all others leaves STEP, if there is so much."""
CROWDED = 4 / 3
"""A range of 2**i places may hold CROWDED**i names; all of them, 50 million."""


def place(db: Writer, name: str) -> int:
    """A place that nobody has, for a name that has none; it may move others, in `heads` and `search`."""
    while True:
        below = db.query("select place from heads where name < ? order by name desc limit 1", name)
        above = db.query("select place from heads where name > ? order by name limit 1", name)
        low, high = (below[0]["place"] if below else 0), (above[0]["place"] if above else END)
        if high - low > 1:
            middle = (low + high) // 2
            if not above and below:
                return int(min(middle, low + STEP))
            return int(max(middle, high - STEP) if above and not below else middle)
        _spread(db, low or high)


def _spread(db: Writer, around: int) -> None:
    """Makes room beside a place."""
    for bits in range(2, 63):
        size = 1 << bits
        start = around // size * size
        rows = db.query(
            "select place from heads where place >= ? and place < ? order by place", start, start + size
        )
        if len(rows) <= CROWDED**bits or size == END:
            break
    olds = [int(row["place"]) for row in rows]
    news = [start + size * number // (len(olds) + 1) for number in range(1, len(olds) + 1)]
    moves = list(zip(olds, news, strict=True))
    down = [(old, new) for old, new in moves if new < old]
    up = [(old, new) for old, new in reversed(moves) if new > old]
    for old, new in (*down, *up):  # in this order nobody moves to where another still is
        db.execute("update heads set place = ? where place = ?", new, old)
        db.execute("update search set rowid = ? where rowid = ?", new, old)
