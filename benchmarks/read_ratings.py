"""Time and memory of reading ratings in MovieLens-25M's format, and of opening them again.

    python benchmarks/read_ratings.py [--ratings 25000000] [--k_core 5] [--folder DIR]

Writes synthetic ratings.csv, movies.csv and text features with the sizes of ml-25m to a temporary
folder (about 800 MB; removed afterwards), then reads them in processes of their own, so that the
peak memory printed is that of the reading alone. Where other programs keep the machine busy, look
at the seconds of CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import Parser, command, number
from util import UserError

ROOT = Path(__file__).resolve().parents[1]
USERS, MOVIES, WIDTH = 162_541, 62_423, 384
FEWEST = 20  # ratings of a user

CHILD = """
import json, sys, time
sys.path.insert(0, {root!r})
import numpy as np
from data_readers import read
from util import UserError, peak_memory_mb
before = peak_memory_mb(__import__("torch").device("cpu"))
start, cpu = time.perf_counter(), time.process_time()
try:
    data = read({folder!r}, data_dir={data_dir!r}, k_core={k_core})
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
seconds = time.perf_counter() - start
part = data.catalogue.modalities["text"]
print(json.dumps({{
    "seconds": seconds,
    "cpu": time.process_time() - cpu,
    "peak_gb": peak_memory_mb(__import__("torch").device("cpu")) / 1024,
    "imports_gb": before / 1024,
    "users": data.sequences.n_users,
    "items": data.catalogue.n_items,
    "interactions": len(data.sequences.items),
    "features": list(part.features.shape),
    "features_mapped": isinstance(part.features.base, np.memmap),
}}))
"""


def write_files(folder: Path, ratings: int, seed: int = 0) -> None:
    """Random files with the sizes of ml-25m; users have 20 ratings or more, as there."""
    rng = np.random.default_rng(seed)
    users = min(USERS, ratings // FEWEST)
    lengths = FEWEST + rng.multinomial(ratings - FEWEST * users, rng.dirichlet(np.full(users, 0.5)))
    movies = np.sort(rng.choice(209_171, MOVIES, replace=False) + 1)
    with open(folder / "ratings.csv", "w", encoding="ascii") as file:
        file.write("userId,movieId,rating,timestamp\n")
        for start in range(0, users, 4000):  # bounded memory here as well
            block = lengths[start : start + 4000]
            size = block.sum()
            columns = (
                np.repeat(np.arange(start, start + len(block)) + 1, block),
                movies[(MOVIES * rng.random(size) ** 3).astype(int)],  # some are much more popular
                rng.integers(1, 11, size) / 2,
                rng.integers(789_652_009, 1_574_327_703, size),
            )
            rows = zip(*(column.tolist() for column in columns), strict=True)
            file.writelines(f"{u},{i},{r},{t}\n" for u, i, r, t in rows)
    names = "".join(f'{movie},"Movie, the {movie}th (2000)",Drama|War\n' for movie in movies)
    (folder / "movies.csv").write_text(f"movieId,title,genres\n{names}", encoding="ascii")
    ids = "".join(f"{movie}\n" for movie in movies)
    (folder / "items.csv").write_text(f"item_id\n{ids}", encoding="ascii")
    np.save(folder / "text.npy", rng.standard_normal((MOVIES, WIDTH), np.float32))


def measure(folder: Path, data_dir: Path, k_core: int) -> dict:
    """Read in a fresh process. Raises UserError for what the reader refuses."""
    values = {"folder": str(folder), "data_dir": str(data_dir), "k_core": k_core}
    code = CHILD.format(root=str(ROOT), **values)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode == 2:
        raise UserError(done.stderr.strip())
    done.check_returncode()
    return json.loads(done.stdout)


@command
def main(arguments: list[str] | None = None) -> None:
    """Print one line per reading."""
    parser = Parser(__doc__)
    parser.add_number("--ratings", 25_000_000, "rows of ratings.csv", number(int, FEWEST))
    parser.add_number("--k_core", 5, "ratings of a user or item to keep", number(int, 0))
    parser.add_argument("--folder", help="where the temporary folder is made")
    found = parser.parse_args(arguments)
    if found.folder and not Path(found.folder).is_dir():
        raise UserError(f"--folder {found.folder}: there is no such folder; make it first.")
    with tempfile.TemporaryDirectory(dir=found.folder) as temporary:
        folder, data_dir = Path(temporary) / "ml-25m", Path(temporary) / "data"
        folder.mkdir()
        write_files(folder, found.ratings)
        size = (folder / "ratings.csv").stat().st_size / 1e6
        print(f"{found.ratings:,} ratings, {size:.0f} MB")
        time.sleep(6)  # hashes are remembered only of files that have settled
        for label in ("read and cached", "opened again"):
            row = measure(folder, data_dir, found.k_core)
            print(
                f"{label:<16} {row['seconds']:7.2f} s ({row['cpu']:.2f} s of CPU), "
                f"peak {row['peak_gb']:.2f} GB ({row['imports_gb']:.2f} GB of it imports); "
                f"{row['users']:,} users, {row['items']:,} items, "
                f"{row['interactions']:,} interactions, "
                f"features {row['features']} memory-mapped: {row['features_mapped']}"
            )


if __name__ == "__main__":
    sys.exit(main())
