"""Device, seeds, logging, run folders, checkpoints, processes: what all parts ask of a machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import yaml


class UserError(Exception):
    """A mistake the user can mend: one clear sentence, printed without traceback, exit code 2."""


# --------------------------------------------------------------------------- device and precision


def pick_device(wanted: str) -> torch.device:
    """`auto` takes a GPU when there is one. Raises UserError for `cuda` on a machine without."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: this PyTorch sees no GPU; use --device cpu or leave it out."
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # cuDNN's attention plans anew for every length of a batch, which costs more than it saves
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def autocast_type(amp: str, device: torch.device) -> torch.dtype | None:
    """Mixed-precision type, None for full precision. A CPU has bf16 whatever is asked for,
    and none if it does not multiply it by itself: that would only be slower."""
    if amp == "off":
        return None
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
    if amp == "fp16" or (amp == "auto" and not torch.cuda.is_bf16_supported(False)):
        return torch.float16
    return torch.bfloat16


# --------------------------------------------------------------------------- randomness


def seed_everything(seed: int) -> None:
    """Seed the global generators (weight initialisation and dropout use torch's)."""
    random.seed(seed)
    torch.manual_seed(seed)


def stream_seed(seed: int, *stream: str | int) -> int:
    """A seed of its own for each named stream, so that streams never share random numbers."""
    text = "/".join(map(str, (seed, *stream)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, *stream: str | int) -> torch.Generator:
    """CPU generator of one stream."""
    return torch.Generator().manual_seed(stream_seed(seed, *stream))


def random_state() -> dict[str, torch.Tensor]:
    """State of torch's global generators, to put into a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Inverse of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# --------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it only when the block succeeds.

    Raises UserError when the disk is full or the folder cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Atomic, indented, and strict: NaN becomes null."""
    with atomic_path(path) as temporary:
        temporary.write_text(
            json.dumps(_plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Atomic YAML in the order given."""
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and value not in (float("inf"), float("-inf")):
        return None if value != value else value
    return str(value) if isinstance(value, float) else value


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Tensors and plain values only, so that loading never runs code."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # how torch's writer reports a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Raises UserError when the file is missing or is no checkpoint."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint {path}.") from None
    except Exception as error:
        raise UserError(
            f"{path} is no readable checkpoint ({type(error).__name__}); remove it and run again."
        ) from error


def new_run_folder(save_dir: str, label: str) -> Path:
    """`save_dir/<label>_<timestamp>`, created here and never shared with another run."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        suffix = f"-{attempt}" if attempt else ""
        folder = Path(save_dir) / f"{label}_{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"Cannot create {folder}: {error.strerror}.") from None
    raise UserError(f"{save_dir} has too many runs of this second; try again.")


def claim(path: Path) -> IO[str] | None:
    """Hold the existing file `path` until the result is closed or this process ends, however.

    None when another process holds it. Raises UserError for a file that cannot be written.
    """
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from None
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except (ImportError, OSError):  # Windows and some network disks have no such locks
        pass
    return file


# --------------------------------------------------------------------------- logging, environment


def start_logging(log_dir: str) -> logging.Logger:
    """Logger `pmat`: plain lines on the screen, time-stamped ones in `log_dir/experiment.log`.

    Only the first process of several speaks.
    """
    logger = logging.getLogger("pmat")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    logger.propagate = False
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(screen)
    try:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(Path(log_dir) / "experiment.log", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--log_dir {log_dir}: {error.strerror}.") from None
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)
    return logger


def say(text: str) -> None:
    """Print. Where whoever read it has gone, as with `| head`, this and all that follows goes
    nowhere, and the program goes on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def environment(device: torch.device, amp: str) -> dict[str, Any]:
    """Versions and machine class, for metrics.json; no host name, no path."""
    half = autocast_type(amp, device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "training": str(half or torch.float32).removeprefix("torch."),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def machine_name(found: dict[str, Any]) -> str:
    """The device of an `environment`; of a CPU the kind, where it is known."""
    kind = found.get("processor", "")
    return f"cpu ({kind})" if found["device"] == "cpu" and kind else found["device"]


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    return platform.processor()


def reset_peak_memory(device: torch.device) -> float:
    """Let `peak_memory_mb` start anew; returns where it starts, what the process holds already, or
    NaN where the system cannot (it can with CUDA and on Linux)."""
    if device.type == "cuda":
        torch.cuda.init()  # the statistics are no more there than the device before this
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return float("nan")
    return peak_memory_mb(device)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory since the last reset: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag the loop looks at; the second one kills."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._previous = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread: signals are somebody else's business
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.requested = True
        for signal_number, handler in self._previous.items():
            signal.signal(signal_number, handler)


class Stopwatch:
    """Seconds since it was made or last read with `lap`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    @property
    def seconds(self) -> float:
        """Seconds since the last lap, without ending it."""
        return time.perf_counter() - self._start


# --------------------------------------------------------------------------- several processes


def rank() -> int:
    """Number of this process, 0 when there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that torchrun started; nothing without torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """In place, the sum over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_first(value: Any) -> Any:
    """The value the first process has."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
