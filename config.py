"""Every default in one place: edit a number here, or overlay it from YAML or the command line.

Order, later wins: the dataclass defaults below, what the mode asks for (MODE_DEFAULTS, and
MODE_DATA_PRESETS for mock data), the data set's and the model's presets (DATASET_PRESETS,
MODEL_PRESETS), `--config file.yaml`, `--set key=value`, the command-line flags. So edit a value
that a preset names in the preset: the dataclass has that of other data sets, or of the paper. In
`quick` and `theory` mode the mode's epochs (and batch size) beat the presets, so that a short run
stays one.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from settings import (
    ConfigError,
    assign,
    check_defaults,
    choice,
    closest,
    keys,
    number,
    read_pairs,
    read_sections,
    setting,
)

__all__ = ["Config", "ConfigError", "build_config", "closest", "keys", "read_pairs", "read_yaml"]

# --------------------------------------------------------------------------- run, data, training

MOCK_DIMS = {"visual": 32, "text": 48, "audio": 16}
LAST_SEED = 2**31 - 1
MODES = ("quick", "baseline", "ablation", "hyper", "mcrl", "full", "theory", "report")


@dataclass
class Run:
    """What to do and where to put it."""

    mode: str = choice("quick", MODES, "what to run")
    model: str = setting("pmat", "model, or several separated by commas in mode baseline")
    device: str = choice("auto", ("auto", "cpu", "cuda"), "auto takes a GPU when there is one")
    seed: int = number(42, 0, LAST_SEED, "first random seed")
    seeds: int = number(1, 1, 100, "runs per model, with seeds seed, seed+1, ...")
    label: str = setting("", "which variant of the model a run is; modes set it (empty: none)")
    source: str = setting("", "mode report: the run folder whose tables and figures to rebuild")
    save_dir: str = setting("./results", "folder of the run folders")
    log_dir: str = setting("./logs", "folder of experiment.log")


@dataclass
class Data:
    """What to read and how to split it."""

    dataset: str = setting("mock", "mock, amazon, movielens, mmrec, or the path of a data folder")
    data_dir: str = setting("./data", "where data sets and the cache of prepared arrays live")
    max_history: int = number(50, 2, 10_000, "newest items of a history that a model sees")
    tie_policy: str = choice(
        "file", ("file", "shuffle"), "order of equal timestamps: as in the file, or seeded random"
    )
    seed: int = number(42, 0, LAST_SEED, "of the mock data and of shuffled ties, not of the model")
    min_rating: float = number(0.0, 0.0, 1e9, "drop interactions rated below this (0 keeps all)")
    k_core: int = number(0, 0, 1000, "drop users and items with fewer interactions (0 keeps all)")
    features: str = choice(
        "auto", ("auto", "text", "visual", "none"), "all features there are, one kind, or none"
    )
    edition: str = setting(
        "", "amazon: 2014/Beauty, 2023/All_Beauty, ...; movielens: ml-25m, ml-1m, ... (empty: any)"
    )
    features_from: str = setting("", "folder of items.csv and <modality>.npy, for raw files only")
    text_encoder: str = setting("all-MiniLM-L6-v2", "sentence-transformers name or local folder")
    image_encoder: str = setting("efficientnet_b0", "torchvision name, or NAME:FILE.pth")
    cache: bool = setting(True, "keep prepared arrays under data_dir/cache")


@dataclass
class Mock:
    """The embedded data set with planted truth."""

    n_users: int = number(600, 10, 10_000_000, "users")
    n_items: int = number(500, 20, 10_000_000, "items")
    dims: dict = field(
        default_factory=lambda: dict(MOCK_DIMS), metadata={"help": "feature width of each modality"}
    )
    history_min: int = number(8, 3, 10_000, "shortest history")
    history_max: int = number(30, 3, 10_000, "longest history")
    drift_share: float = number(0.2, 0.0, 1.0, "share of users whose modality weights change")
    missing_share: float = number(0.1, 0.0, 0.9, "share of items that lack a given modality")


@dataclass
class Train:
    """The training loop, the same for every model."""

    epochs: int = number(10, 0, 100_000, "passes over the train examples")
    batch_size: int = number(32, 1, 1_000_000, "examples per step, over all processes")
    lr: float = number(1e-4, 0.0, 10.0, "learning rate after the warm-up")
    weight_decay: float = number(0.0, 0.0, 10.0, "decoupled weight decay (AdamW)")
    schedule: str = choice("constant", ("constant", "cosine", "linear"), "shape after the warm-up")
    warmup_steps: int = number(
        0, 0, 10_000_000, "steps of linear warm-up, at most a quarter of all"
    )
    clip: float = number(1.0, 0.0, 1e6, "largest gradient norm (0 = no clipping)")
    patience: int = number(
        10, 0, 100_000, "stop after so many evaluations without a better valid NDCG@10 (0: never)"
    )
    eval_every: int = number(1, 1, 100_000, "epochs between evaluations on valid")
    eval_batch_size: int = number(256, 1, 1_000_000, "users scored at once")
    mask_seen: bool = setting(True, "leave items of the history out of the ranking")
    amp: str = choice(
        "auto",
        ("auto", "bf16", "fp16", "off"),
        "mixed precision in training; on a CPU bf16 or none",
    )
    compile: bool = setting(False, "torch.compile the model")
    num_workers: int = number(0, 0, 64, "0 builds batches in the loop, more prefetches in a thread")
    checkpoint_minutes: float = number(10.0, 0.0, 1e6, "minutes between checkpoints in an epoch")
    tensorboard: bool = setting(False, "also write TensorBoard events (needs the package)")


@dataclass
class Hyper:
    """Mode hyper: the search over a model's `search_space`."""

    trials: int = number(20, 1, 100_000, "trials of a study, those already finished included")
    startup: int = number(5, 0, 100_000, "random trials before the sampler learns and prunes")
    join: str = setting("", "folder of a search that goes on elsewhere: work on its trials")


@dataclass
class Full:
    """Mode full: what it measures beyond the other modes."""

    sizes: str = setting("500,2000,8000", "catalogue sizes of the latency curve, with commas")
    size_seconds: float = number(
        20.0, 0.0, 1e6, "stop after a catalogue size that took longer to prepare"
    )
    case_users: int = number(
        3, 1, 100, "users of the case study, or one for each modality if these are more"
    )


# --------------------------------------------------------------------------- models


@dataclass
class SASRec:
    """baseline_models/sasrec.py"""

    width: int = number(64, 4, 8192, "embedding and hidden width")
    layers: int = number(2, 1, 64, "blocks")
    heads: int = number(2, 1, 64, "attention heads")
    inner: int = number(256, 4, 65536, "feed-forward width")
    dropout: float = number(0.5, 0.0, 0.95, "everywhere")
    temperature: float = number(0.0, 0.0, 10.0, "tau of scores that are cosines; 0: plain products")


@dataclass
class BSARec:
    """baseline_models/bsarec.py"""

    width: int = number(64, 4, 8192, "embedding and hidden width")
    layers: int = number(2, 1, 64, "blocks")
    heads: int = number(1, 1, 64, "attention heads")
    dropout: float = number(0.5, 0.0, 0.95, "everywhere")
    alpha: float = number(0.7, 0.0, 1.0, "weight of the filter against attention")
    cutoff: int = number(5, 1, 1000, "c of the paper: c // 2 + 1 low frequencies pass")
    temperature: float = number(0.0, 0.0, 10.0, "tau of scores that are cosines; 0: plain products")


@dataclass
class RPG:
    """baseline_models/rpg.py; sizes of the paper: width 448, inner 1024, digits 32 (Beauty)."""

    digits: int = number(32, 1, 1024, "m, digits of a semantic ID")
    codes: int = number(256, 2, 65536, "codes per digit")
    width: int = number(448, 4, 8192, "embedding and hidden width")
    layers: int = number(2, 1, 64, "blocks")
    heads: int = number(4, 1, 64, "attention heads")
    inner: int = number(1024, 4, 65536, "feed-forward width")
    embedding_dropout: float = number(0.5, 0.0, 0.95, "on the input")
    attention_dropout: float = number(0.5, 0.0, 0.95, "on attention weights")
    temperature: float = number(0.03, 1e-4, 10.0, "tau of the digit softmax")
    pca: int = number(
        0, 0, 8192, "whitened PCA width before OPQ; 0: 512 of wide features, else 128"
    )
    features: str = choice("all", ("all", "text"), "what IDs are made of: all modalities, or text")
    tokenizer: str = choice("opq", ("opq", "random"), "random codes are the control")
    start_from_codewords: bool = setting(
        False, "token vectors start as codewords; the paper starts at random"
    )
    decoding: str = choice(
        "exhaustive", ("exhaustive", "graph"), "score all items, or walk the graph"
    )
    beams: int = number(20, 1, 100_000, "b, items kept at each step of the graph walk")
    edges: int = number(200, 1, 100_000, "k, neighbours of an item in the graph")
    steps: int = number(3, 1, 1000, "q, steps of the graph walk")


AMONG = ("all", "existing")


@dataclass
class Seq2Seq:
    """Encoder-decoder of models that write semantic IDs; sizes of TIGER's paper."""

    width: int = number(128, 4, 8192, "token vectors and hidden width")
    layers: int = number(4, 1, 64, "layers of the encoder and of the decoder")
    attention_heads: int = number(6, 1, 64, "attention heads")
    head_width: int = number(64, 1, 1024, "width of a head; heads need not add up to width")
    inner: int = number(1024, 4, 65536, "feed-forward width")
    dropout: float = number(0.1, 0.0, 0.95, "everywhere")
    codes: int = number(256, 2, 65536, "codes per digit")
    history: int = number(20, 1, 10_000, "newest items of a history that are read")
    beams: int = number(50, 1, 100_000, "IDs that beam search keeps")
    among: str = choice(
        "all", AMONG, "codes a digit is predicted among: all, or those that some ID goes on with"
    )


@dataclass
class DecoderOnly:
    """Decoder of models that write semantic IDs (GPT-2)."""

    width: int = number(256, 4, 8192, "token vectors and hidden width")
    layers: int = number(4, 1, 64, "blocks")
    heads: int = number(4, 1, 64, "attention heads")
    inner: int = number(1024, 4, 65536, "feed-forward width")
    dropout: float = number(0.1, 0.0, 0.95, "everywhere")
    codes: int = number(256, 2, 65536, "codes per digit")
    beams: int = number(50, 1, 100_000, "IDs that beam search keeps")
    among: str = choice(
        "all", AMONG, "codes a digit is predicted among: all, or those that some ID goes on with"
    )


@dataclass
class AutoencoderIDs(Seq2Seq):
    """The autoencoder of TIGER, LETTER and CoFiRec; sizes of TIGER's paper."""

    latent: int = number(32, 1, 4096, "width of what is quantised")
    hidden: int = number(512, 1, 65536, "widest layer")
    depth: int = number(3, 1, 16, "hidden layers, each half as wide as the one before")
    tokenizer_steps: int = number(20_000, 0, 10_000_000, "training steps of an autoencoder")


@dataclass
class TIGER(AutoencoderIDs):
    """baseline_models/tiger.py; the paper has 2,000 user tokens and RQ-VAE IDs."""

    digits: int = number(3, 1, 1024, "levels; one more digit tells equal items apart")
    user_tokens: int = number(1, 1, 1_000_000, "tokens that users are hashed to; 1: no user token")
    tokenizer: str = choice(
        "kmeans", ("kmeans", "rqvae", "random"), "residual k-means, RQ-VAE, or the control"
    )
    features: str = choice("all", ("all", "text"), "what IDs are made of: all modalities, or text")


@dataclass
class LETTER(AutoencoderIDs):
    """baseline_models/letter.py; sizes of the paper."""

    hidden: int = number(2048, 1, 65536, "widest layer")
    depth: int = number(6, 1, 16, "hidden layers, each half as wide as the one before")
    digits: int = number(4, 2, 1024, "levels of codebooks")
    features: str = choice("all", ("all", "text"), "what IDs are made of: all modalities, or text")
    alpha: float = number(0.02, 0.0, 1e3, "weight of the alignment with collaborative vectors")
    beta: float = number(1e-4, 0.0, 1e3, "weight of the diversity of codewords")
    groups: int = number(10, 1, 10_000, "clusters of codewords that diversity works in")
    window: int = number(5, 1, 10_000, "items this near in a history count as met")
    temperature: float = number(0.8, 1e-3, 100.0, "tau of the token loss; 1 is plain")


@dataclass
class CoFiRec(AutoencoderIDs):
    """baseline_models/cofirec.py"""

    collaborative: bool = setting(True, "a token made of co-occurrence, after those of features")
    behaviour: int = number(64, 1, 4096, "width of the vectors that it is made of")
    window: int = number(5, 1, 10_000, "items this near in a history count as met")
    order: str = choice(
        "coarse", ("coarse", "fine"), "coarse to fine as in the paper, or the other way round"
    )
    temperature: float = number(0.8, 1e-3, 100.0, "tau of the token loss; 1 is plain")


@dataclass
class FusID(DecoderOnly):
    """baseline_models/fusid.py; tokenizer of the paper: hidden 2048, digits 5, codes 1024."""

    digits: int = number(5, 1, 64, "n, sub-embeddings and digits of a semantic ID")
    codes: int = number(1024, 2, 65536, "K, centroids per digit")
    part: int = number(128, 1, 4096, "d, width of a sub-embedding")
    hidden: int = number(2048, 4, 65536, "hidden width of the fusion network")
    behaviour: int = number(128, 1, 4096, "width of the co-occurrence vectors that go in")
    alpha: float = number(0.2, 0.0, 1e3, "weight of the covariance and variance terms")
    literal_distance: bool = setting(False, "distance as printed, not over sqrt(2 n d)")
    window: int = number(50, 1, 10_000, "items of one history this near make a pair")
    partners: int = number(10, 1, 10_000, "most frequent partners of an item that are positives")
    pairs: int = number(1024, 4, 1_000_000, "pairs per step of the fusion network")
    tokenizer_steps: int = number(10_000, 0, 10_000_000, "steps of the fusion network")
    fusion_lr: float = number(1e-3, 0.0, 10.0, "learning rate of the fusion network, cosine to 0")
    fusion_decay: float = number(1e-4, 0.0, 10.0, "weight decay of the fusion network")


@dataclass
class MMQ(Seq2Seq):
    """baseline_models/mmq.py; tokenizer of the paper: 2 + 2 experts, 100 codes on public data."""

    codes: int = number(100, 2, 65536, "K, codewords of an expert")
    shared: int = number(2, 1, 64, "experts that see all modalities")
    specific: int = number(2, 1, 64, "experts of each modality")
    expert_width: int = number(256, 4, 8192, "width of experts and codewords")
    quantiser: str = choice("cosine", ("cosine", "euclidean"), "what the nearest codeword is")
    revive: bool = setting(True, "codes that nothing uses start anew in stage one")
    recon: float = number(12.0, 0.0, 1e3, "weight of the reconstruction in stage one")
    aux: float = number(10.0, 0.0, 1e3, "weight of each modality's own reconstruction; 0: never")
    ortho: float = number(0.005, 0.0, 1e3, "weight of the orthogonality of experts")
    tokenizer_steps: int = number(6000, 0, 10_000_000, "steps of stage one")
    stage_one_batch: int = number(1024, 1, 1_000_000, "items per step of stage one")
    stage_one_lr: float = number(1e-3, 0.0, 10.0, "learning rate of stage one, cosine to 0")
    tune_epochs: int = number(50, 0, 100_000, "epochs of stage two, before IDs are frozen; 0: none")
    tune: float = number(0.5, 0.0, 1e3, "weight of both reconstructions in stage two")
    tune_rate: float = number(0.01, 0.0, 10.0, "share of the learning rate that the tokenizer gets")
    softness: float = number(0.1, 1e-4, 10.0, "tau of soft codes in stage two")


@dataclass
class Pctx(Seq2Seq):
    """baseline_models/pctx.py; sizes of the paper: context 256, generator as TIGER's."""

    digits: int = number(4, 2, 64, "digits of an ID, the last one tells equal ones apart")
    context: int = number(256, 4, 8192, "width of the context encoder")
    context_layers: int = number(2, 1, 64, "blocks of the context encoder")
    context_heads: int = number(2, 1, 64, "attention heads of the context encoder")
    context_dropout: float = number(0.3, 0.0, 0.95, "dropout of the context encoder")
    tokenizer_steps: int = number(50_000, 0, 10_000_000, "training steps of the context encoder")
    context_batch: int = number(256, 2, 1_000_000, "prefixes per step")
    context_lr: float = number(3e-3, 0.0, 10.0, "learning rate of stage one, cosine to 0")
    contrast: float = number(0.2, 0.0, 1e3, "weight of each contrastive term of stage one")
    temperature: float = number(0.07, 1e-3, 10.0, "tau of the contrastive terms")
    groups: int = number(10, 1, 1000, "T, groups of items by frequency")
    start: int = number(2, 1, 10_000, "contexts of an item of the rarest group")
    step: int = number(3, 0, 10_000, "delta, contexts more in each more frequent group")
    kappa: float = number(4.5, 0.01, 1e3, "shape of the Gamma density of group sizes")
    blend: float = number(0.5, 0.0, 1.0, "weight of the context against the features")
    rare: float = number(
        0.2, 0.0, 1.0, "IDs that stand for less than this share of an item are merged; 0: none"
    )
    replace: float = number(
        0.7, 0.0, 1.0, "gamma, chance that a random ID of the item replaces that of its context"
    )
    passes: int = number(5, 1, 100, "readings of a history that vote at test")


@dataclass
class PRISM:
    """baseline_models/prism.py; the paper's size is width 256."""

    host: str = choice("sasrec", ("sasrec", "stosa"), "sequence model around the experts")
    width: int = number(256, 4, 8192, "embedding and hidden width")
    layers: int = number(1, 1, 64, "blocks")
    heads: int = number(4, 1, 64, "attention heads")
    dropout: float = number(0.3, 0.0, 0.95, "on the input and in the blocks")
    gate_dropout: float = number(0.3, 0.0, 0.95, "in the gate of the experts")
    expert: int = number(128, 4, 65536, "hidden width of an expert")
    temperature: float = number(0.7, 1e-3, 100.0, "of the softmax over experts")
    unique: float = number(0.1, 0.0, 100.0, "weight of the uniqueness losses")
    synergy: float = number(0.1, 0.0, 100.0, "weight of the synergy loss")
    redundancy: float = number(0.1, 0.0, 100.0, "weight of the redundancy loss")
    pooling: str = choice(
        "window", ("window", "causal"), "experts see the whole window, or the items so far"
    )
    objective: str = choice(
        "sampled", ("sampled", "softmax"), "one sampled negative a position, or all items"
    )
    pvn: float = number(0.005, 0.0, 100.0, "stosa: weight of the positive-against-negative hinge")
    encode_mean: bool = setting(False, "stosa: encode the means too, which the release discards")


@dataclass
class DGMRec:
    """baseline_models/dgmrec.py; the sizes and weights of the paper's Baby setting."""

    width: int = number(64, 4, 8192, "embedding width")
    ui_layers: int = number(3, 0, 64, "propagation on the user-item graph")
    mm_layers: int = number(2, 0, 64, "propagation on item graphs")
    neighbours: int = number(10, 1, 1000, "items in a row of an item graph, itself included")
    alpha: float = number(0.4, 0.0, 1.0, "weight of the new item graph at a refresh")
    refresh: int = number(5, 1, 100_000, "epochs between refreshes")
    fill_missing: bool = setting(
        True, "features of missing modalities are generated and item graphs refreshed with them"
    )
    disentangle: float = number(0.01, 0.0, 100.0, "lambda_1, weight of L_disentangle")
    align: float = number(0.01, 0.0, 100.0, "lambda_2, weight of L_align")
    generation: float = number(0.05, 0.0, 100.0, "weight of L_gen")
    reconstruction: float = number(0.1, 0.0, 100.0, "weight of L_recon")
    tau_general: float = number(0.4, 1e-3, 100.0, "temperature of general parts")
    tau_behaviour: float = number(0.4, 1e-3, 100.0, "temperature of behaviour and modality")
    tau_align: float = number(0.2, 1e-3, 100.0, "temperature of users and items")


@dataclass
class REARM:
    """baseline_models/rearm.py; the sizes and weights of the paper's Baby setting."""

    width: int = number(64, 4, 8192, "embedding width")
    layers: int = number(4, 0, 64, "propagation on the user-item graph")
    user_layers: int = number(1, 0, 64, "propagation on the user graph")
    item_layers: int = number(1, 0, 64, "propagation on the item graph")
    user_neighbours: int = number(40, 1, 1000, "users in a row of the user graphs")
    item_neighbours: int = number(10, 1, 1000, "items in a row of the item graphs")
    user_co: float = number(0.4, 0.0, 1.0, "weight of co-occurrence against interest similarity")
    item_co: float = number(0.2, 0.0, 1.0, "weight of co-occurrence against feature similarity")
    user_first: float = number(0.2, 0.0, 1.0, "share of pictures in the user graph")
    item_first: float = number(0.0, 0.0, 1.0, "share of pictures in the item graph")
    rank: int = number(3, 1, 1000, "rank of the meta transform")
    self_dropout: float = number(0.4, 0.0, 1.0, "on self-attention weights")
    cross_dropout: float = number(0.6, 0.0, 1.0, "on cross-attention weights")
    contrast: float = number(5e-6, 0.0, 100.0, "weight of the contrast of modalities")
    temperature: float = number(0.6, 1e-3, 100.0, "tau of that contrast")
    orthogonal: float = number(5e-5, 0.0, 100.0, "weight of orthogonality, for batches of 2048")


@dataclass
class AMMRM:
    """baseline_models/ammrm.py; what the paper does not state is marked there."""

    width: int = number(64, 4, 8192, "embedding width")
    heads: int = number(4, 1, 64, "heads of the cross-modal attention")
    ui_layers: int = number(2, 0, 64, "propagation on the user-item graph")
    mm_layers: int = number(1, 0, 64, "propagation on item graphs")
    neighbours: int = number(10, 1, 1000, "items in a row of an item graph")
    edge_dropout: float = number(0.1, 0.0, 0.95, "rho, share of edges left out in an epoch")
    contrast: float = number(0.01, 0.0, 100.0, "weight of InfoNCE of modality and behaviour")
    temperature: float = number(0.2, 1e-3, 100.0, "tau of that InfoNCE")
    norm: float = number(1e-4, 0.0, 100.0, "weight of squared norms of the batch's vectors")


@dataclass
class PMAT:
    """our_models/pmat.py"""

    shared_digits: int = number(16, 0, 1024, "codes of an ID that are the same for everybody")
    personal_digits: int = number(16, 1, 1024, "codes that depend on user and item")
    codes: int = number(256, 2, 65536, "codes per digit")
    latent: int = number(64, 4, 4096, "width of each modality before the blend")
    explained: float = number(
        1.0, 0.01, 1.0, "share of a modality's variance that latents keep; the rest is noise"
    )
    start_from_codewords: bool = setting(
        True, "code vectors start where codewords are, not at random"
    )
    with_behaviour: bool = setting(
        False, "one more modality: which items train histories have together"
    )
    grid: int = number(4, 1, 64, "steps of a modality weight: weights are multiples of 1 / grid")
    personalised: str = choice(
        "user_item",
        ("user_item", "user", "item", "none", "random", "permuted"),
        "what modality weights depend on; the last two are controls",
    )
    law: str = setting(
        "", "random weights: probability of each blend, commas between; empty: all alike"
    )
    fusion: str = choice(
        "early", ("early", "late"), "weigh modalities before the codes, or fixed codes after"
    )
    prefix: bool = setting(False, "add the user context to the state of the generator")
    dynamic: bool = setting(True, "weights follow the history; else its first items decide")
    warm_items: int = number(
        3, 1, 1000, "first items (of the window) that decide where weights do not follow"
    )
    consistency: float = number(0.1, 0.0, 100.0, "weight of the change of alpha from step to step")
    digit_loss: float = number(0.0, 0.0, 100.0, "weight of the cross-entropy of single digits")
    context: int = number(64, 4, 4096, "width of the user context that weights come from")
    attention: int = number(32, 4, 4096, "width of the modality attention")
    attention_rate: float = number(
        0.1, 0.0, 10.0, "share of the learning rate that modality weights learn with"
    )
    sharpness: float = number(
        8.0, 0.0, 100.0, "alpha starts as softmax(sharpness x coherence of the history)"
    )
    prior_pairs: float = number(
        10.0,
        0.0,
        1e6,
        "pairs of cosine 0 that count towards coherence, so that it is small for few items",
    )
    beta: float = number(
        0.0, 0.0, 100.0, "weight of a dense item vector beside the codes (0: none)"
    )
    width: int = number(64, 4, 8192, "code vectors and hidden width")
    layers: int = number(2, 1, 64, "blocks")
    heads: int = number(1, 1, 64, "attention heads")
    dropout: float = number(0.5, 0.0, 0.95, "everywhere")
    filter: float = number(0.7, 0.0, 1.0, "weight of the frequency filter against attention")
    cutoff: int = number(5, 1, 1000, "low frequencies of the filter: cutoff // 2 + 1 pass")
    causal: bool = setting(
        True, "look back only and learn at every position; else a pass for every prefix (slower)"
    )
    negatives: int = number(1024, 1, 10_000_000, "items sampled for the softmax of a step")
    temperature: float = number(0.0, 0.0, 10.0, "tau of scores that are cosines; 0: plain products")


@dataclass
class MCRL:
    """our_models/mcrl.py; sizes of latents, codes and grid are those of PMAT."""

    user: float = number(1.0, 0.0, 1e3, "weight of level 1, users with what they engage next")
    intra: float = number(0.1, 0.0, 1e3, "weight of level 2, feature neighbours in a modality")
    inter: float = number(0.1, 0.0, 1e3, "weight of level 3, shared parts of two modalities")
    commit: float = number(0.1, 0.0, 1e3, "weight of the distance between items and their codes")
    similar: float = number(
        0.1, 0.0, 1.0, "share of level 1 whose positive is the next item of the most similar user"
    )
    temperature: float = number(0.1, 1e-3, 10.0, "tau; level 1 of pmat_mcrl has none: plain scores")
    neighbours: int = number(10, 1, 1000, "nearest items that level 2 draws a partner from")
    lambda_pmat: float = number(1.0, 0.0, 1e3, "weight of PMAT's losses in pmat_mcrl")
    lambda_mcrl: float = number(0.05, 0.0, 1e3, "weight of the levels in pmat_mcrl")
    stage_one_epochs: int = number(10, 0, 100_000, "passes of the encoders before IDs are made")
    stage_one_batch: int = number(512, 2, 1_000_000, "prefixes per step of stage one")
    stage_one_lr: float = number(1e-3, 0.0, 10.0, "learning rate of stage one")
    window: int = number(20, 1, 10_000, "items of a history that stage one looks at")


@dataclass
class Config:
    """All settings; `config.sasrec.width` and so on. Every model's constructor takes this."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    mock: Mock = field(default_factory=Mock)
    train: Train = field(default_factory=Train)
    hyper: Hyper = field(default_factory=Hyper)
    full: Full = field(default_factory=Full)
    sasrec: SASRec = field(default_factory=SASRec)
    bsarec: BSARec = field(default_factory=BSARec)
    rpg: RPG = field(default_factory=RPG)
    tiger: TIGER = field(default_factory=TIGER)
    letter: LETTER = field(default_factory=LETTER)
    cofirec: CoFiRec = field(default_factory=CoFiRec)
    fusid: FusID = field(default_factory=FusID)
    mmq: MMQ = field(default_factory=MMQ)
    pctx: Pctx = field(default_factory=Pctx)
    prism: PRISM = field(default_factory=PRISM)
    dgmrec: DGMRec = field(default_factory=DGMRec)
    rearm: REARM = field(default_factory=REARM)
    ammrm: AMMRM = field(default_factory=AMMRM)
    pmat: PMAT = field(default_factory=PMAT)
    mcrl: MCRL = field(default_factory=MCRL)

    def n_items(self, catalogue: Any = None) -> int:
        """Items of `catalogue`, or of the mock data set when a model is built without one."""
        return self.mock.n_items if catalogue is None else len(catalogue.item_ids)

    def n_modalities(self, catalogue: Any = None) -> int:
        """Modalities of `catalogue`, or of the mock data set; at least 1."""
        return max(len(self.mock.dims if catalogue is None else catalogue.modalities), 1)

    def modality_widths(self, catalogue: Any = None) -> list[int]:
        """Feature width of each modality; [1] without features, which `prepare` may refuse."""
        if catalogue is None:
            return list(self.mock.dims.values()) or [1]
        return [features.shape[1] for features, _ in catalogue.modalities.values()] or [1]


# --------------------------------------------------------------------------- presets

MODE_DEFAULTS: dict[str, dict[str, Any]] = {
    "quick": {"train.epochs": 2, "train.batch_size": 64},
    "theory": {"train.epochs": 3},
}

# Models of a mode when the command names none; mode baseline takes all.
MODE_MODELS: dict[str, tuple[str, ...]] = {"ablation": ("pmat", "pmat_mcrl"), "hyper": ("pmat",)}

# By mode and data set; these beat the presets of data sets and models.
MODE_DATA_PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    # everything in half an hour on two cores
    ("full", "mock"): {
        "mock.n_users": 200,
        "mock.n_items": 200,
        "hyper.trials": 6,
        "full.sizes": "200,800,3200",
        "full.size_seconds": 5.0,
    },
}

# By the name of the data set (its folder, or `mock`).
DATASET_PRESETS: dict[str, dict[str, Any]] = {
    "movielens-small": {"data.k_core": 5},
    # raw files: `amazon` and `movielens` by name, the others by the folder they were unpacked to
    "amazon": {"data.k_core": 5},
    "movielens": {"data.k_core": 5},
    "ml-latest-small": {"data.k_core": 5},
    "ml-latest": {"data.k_core": 5},
    "ml-25m": {"data.k_core": 5},
    "ml-1m": {"data.k_core": 5},
}

# On real data: the modalities there are and behaviour (items taken together); with a grid of 2
# a blend has at most two of them.
REAL_PMAT = {
    "train.lr": 1e-3,
    "train.batch_size": 256,
    "train.schedule": "cosine",
    "train.epochs": 24,
    "train.eval_every": 4,
    "pmat.width": 128,
    "pmat.with_behaviour": True,
    "pmat.shared_digits": 32,
    "pmat.grid": 2,
    "pmat.negatives": 1024,
    "pmat.dropout": 0.5,
}

# A few hundred to some thousand users: enough steps in an epoch.
SMALL_SETS = ("lfm2k", "movielens-small", "ml-latest-small", "tiktok")
SMALL_PMAT = {name: {"train.batch_size": 32} for name in SMALL_SETS}


def _on_big_sets(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Presets for a million interactions: histories long enough to need less dropout (.2 and .5
    were compared, on valid, for `sasrec`, `bsarec` and `pmat`), and steps enough in a pass."""
    return dict.fromkeys(("movielens-1m", "ml-1m"), settings)


MOCK_PMAT = {
    "train.lr": 2e-3,
    "train.batch_size": 64,
    "train.schedule": "constant",
    "train.eval_every": 1,
    "pmat.width": 64,
    "train.epochs": 25,
    "train.patience": 5,
    "pmat.dropout": 0.2,
    "pmat.codes": 32,
    "pmat.negatives": 1024,
    "pmat.shared_digits": 16,
    "pmat.explained": 0.9,
    "pmat.with_behaviour": False,
    "pmat.grid": 4,
}


def _id_writer(
    name: str, own: dict[str, Any] | None = None, mock: dict[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Presets of an encoder-decoder that writes IDs, in sizes for two CPU cores.

    The dataclasses above have the sizes of the papers. `own` adds to all presets, `mock` to that of
    this data set.
    """
    everywhere = {
        "among": "existing",
        "width": 96,
        "layers": 2,
        "attention_heads": 4,
        "head_width": 24,
        "inner": 384,
        "hidden": 256,
        "depth": 2,
        "tokenizer_steps": 1000,
    } | (own or {})
    small = {
        "width": 64,
        "layers": 1,
        "attention_heads": 2,
        "head_width": 32,
        "inner": 128,
        "codes": 32,
        "history": 10,
        "beams": 30,
        "hidden": 128,
        "depth": 1,
        "tokenizer_steps": 300,
    } | (mock or {})
    return {
        "*": {
            "train.lr": 2e-3,
            "train.batch_size": 256,
            "train.schedule": "cosine",
            "train.warmup_steps": 500,
            "train.epochs": 24,
            "train.eval_every": 4,
        }
        | {f"{name}.{key}": value for key, value in everywhere.items()},
        "mock": {
            "train.lr": 3e-3,
            "train.batch_size": 128,
            "train.warmup_steps": 50,
            "train.epochs": 10,
            "train.eval_every": 5,
        }
        | {f"{name}.{key}": value for key, value in small.items()},
    }


# By model; under "*" for every data set, else by the data set's name.
MODEL_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "sasrec": {
        "*": {"train.lr": 1e-3, "train.batch_size": 128, "train.epochs": 150},
        "mock": {"train.batch_size": 64, "train.epochs": 30, "sasrec.dropout": 0.2},
    }
    | _on_big_sets({"sasrec.dropout": 0.2}),
    "bsarec": {
        "*": {
            "train.lr": 1e-3,
            "train.batch_size": 256,
            "train.schedule": "cosine",
            "train.epochs": 30,
        },
        "mock": {"train.schedule": "constant", "train.epochs": 15, "bsarec.dropout": 0.2},
    }
    | _on_big_sets({"bsarec.dropout": 0.2, "train.batch_size": 1024, "train.lr": 2e-3}),
    # graph models: sizes are the papers', rates are higher so that a CPU gets there in half an hour
    "prism": {
        "*": {
            "train.lr": 1e-3,
            "train.batch_size": 256,
            "train.epochs": 80,
            "prism.width": 64,
        },
        "mock": {"train.batch_size": 64, "train.epochs": 50},
    },
    "dgmrec": {
        "*": {
            "train.lr": 3e-3,
            "train.batch_size": 2048,
            "train.epochs": 40,
            "train.eval_every": 2,
            "train.clip": 0.0,
        },
        "mock": {"train.lr": 5e-3, "train.batch_size": 512, "train.epochs": 12},
    },
    "rearm": {
        "*": {
            "train.lr": 2e-3,
            "train.batch_size": 2048,
            "train.epochs": 16,
            "train.clip": 0.0,
            "train.weight_decay": 5e-4,
            # attention with dropout has no fused form on a CPU and costs ten times as much
            "rearm.self_dropout": 0.0,
            "rearm.cross_dropout": 0.0,
        },
        "mock": {"train.lr": 5e-3, "train.batch_size": 512, "train.epochs": 10},
    },
    "ammrm": {
        "*": {
            "train.lr": 3e-3,
            "train.batch_size": 2048,
            "train.epochs": 50,
            "train.eval_every": 2,
            "train.patience": 3,
            "train.clip": 0.0,
        },
        "mock": {"train.lr": 5e-3, "train.batch_size": 512, "train.epochs": 20},
    },
    "pmat": {"*": REAL_PMAT, "mock": MOCK_PMAT} | SMALL_PMAT | _on_big_sets({"pmat.dropout": 0.2}),
    "mcrl": {
        "*": {"train.lr": 1e-3, "train.batch_size": 512, "train.epochs": 30},
        "mock": {
            "train.batch_size": 256,
            "train.epochs": 20,
            "pmat.codes": 32,
            "pmat.explained": 0.9,
        },
    },
    "pmat_mcrl": {"*": REAL_PMAT, "mock": MOCK_PMAT}
    | SMALL_PMAT
    | _on_big_sets({"pmat.dropout": 0.2, "mcrl.stage_one_epochs": 2}),
    "tiger": _id_writer("tiger", mock={"digits": 2}),
    # .02 as in the paper hardly moves IDs made of features of our scale; see BASELINE_MODELS.md
    "letter": _id_writer("letter", {"alpha": 1.0}, mock={"digits": 3}),
    "cofirec": _id_writer("cofirec"),
    "fusid": {
        # sizes for two CPU cores; the dataclasses above have those of the papers
        "*": {
            "data.max_history": 20,
            "train.lr": 1e-3,
            "train.batch_size": 64,
            "train.weight_decay": 0.05,
            "train.schedule": "cosine",
            "train.warmup_steps": 300,
            "train.epochs": 30,
            "train.eval_every": 3,
            "train.patience": 4,
            "fusid.among": "existing",
            "fusid.digits": 4,
            "fusid.codes": 256,
            "fusid.hidden": 512,
            "fusid.pairs": 512,
            "fusid.tokenizer_steps": 1500,
            "fusid.width": 128,
            "fusid.layers": 3,
            "fusid.inner": 512,
            "fusid.beams": 20,
        },
        "mock": {
            "train.epochs": 20,
            "train.batch_size": 32,
            "train.lr": 2e-3,
            "train.warmup_steps": 50,
            "train.eval_every": 5,
            "fusid.codes": 32,
            "fusid.part": 16,
            "fusid.hidden": 64,
            "fusid.behaviour": 16,
            "fusid.tokenizer_steps": 200,
            "fusid.width": 64,
            "fusid.layers": 2,
            "fusid.inner": 128,
        },
    },
    "mmq": {
        "*": {
            "data.max_history": 20,
            "train.lr": 3e-3,
            "train.batch_size": 256,
            "train.schedule": "cosine",
            "train.warmup_steps": 500,
            "train.epochs": 28,
            "train.eval_every": 4,
            "mmq.among": "existing",
            "mmq.tokenizer_steps": 1000,
            "mmq.stage_one_lr": 3e-3,
            "mmq.tune_epochs": 1,
            "mmq.width": 96,
            "mmq.layers": 2,
            "mmq.attention_heads": 4,
            "mmq.head_width": 24,
            "mmq.inner": 384,
            "mmq.history": 10,
            "mmq.beams": 20,
        },
        "mock": {
            "train.epochs": 8,
            "train.batch_size": 128,
            "train.lr": 3e-3,
            "train.warmup_steps": 50,
            "mmq.width": 64,
            "mmq.layers": 1,
            "mmq.attention_heads": 2,
            "mmq.head_width": 32,
            "mmq.inner": 128,
            "mmq.codes": 32,
            "mmq.expert_width": 32,
            "mmq.tokenizer_steps": 200,
            "mmq.tune_epochs": 3,
        },
    },
    "pctx": {
        "*": {
            "data.max_history": 20,
            "train.lr": 2e-3,
            "train.batch_size": 256,
            "train.schedule": "cosine",
            "train.warmup_steps": 500,
            "train.weight_decay": 0.05,
            "train.epochs": 16,
            "train.eval_every": 4,
            "train.patience": 2,
            "pctx.among": "existing",
            "pctx.context": 64,
            "pctx.tokenizer_steps": 2000,
            "pctx.width": 96,
            "pctx.layers": 2,
            "pctx.attention_heads": 4,
            "pctx.head_width": 24,
            "pctx.inner": 384,
            "pctx.beams": 20,
            "pctx.passes": 3,
        },
        "mock": {
            "train.epochs": 12,
            "train.eval_every": 3,
            "train.batch_size": 128,
            "train.lr": 3e-3,
            "train.warmup_steps": 50,
            "pctx.width": 64,
            "pctx.layers": 1,
            "pctx.attention_heads": 2,
            "pctx.head_width": 32,
            "pctx.inner": 128,
            "pctx.codes": 32,
            "pctx.context": 32,
            "pctx.tokenizer_steps": 200,
            "pctx.context_batch": 64,
            "pctx.passes": 2,
        },
    },
    "rpg": {
        # on two CPU cores two hours for Amazon Beauty; width 256, inner 768 and 60 epochs take one
        # and lose little; the dataclass above has the sizes of the paper
        "*": {
            "train.lr": 1e-3,
            "train.batch_size": 64,
            "train.schedule": "cosine",
            "train.epochs": 70,
            "train.eval_every": 5,
            "rpg.width": 384,
            "rpg.inner": 1024,
            "rpg.embedding_dropout": 0.3,
            "rpg.attention_dropout": 0.3,
            "rpg.start_from_codewords": True,
        },
        "mock": {
            "train.lr": 2e-3,
            "train.epochs": 40,
            "train.eval_every": 2,
            "rpg.width": 64,
            "rpg.inner": 128,
            "rpg.digits": 8,
            "rpg.codes": 32,
            "rpg.pca": 32,
        },
    },
}


# --------------------------------------------------------------------------- reading and checking


def read_yaml(path: str) -> dict[str, Any]:
    """Dotted key -> value of a YAML overlay.

    Raises ConfigError for a file that is none, or has a setting that cannot be.
    """
    found = read_sections(path, {section.name for section in dataclasses.fields(Config)})
    tried = Config()
    for key, value in found.items():  # once here, where the file's name is known
        assign(tried, key, value, path)
    return found


def dataset_name(dataset: str) -> str:
    """The name of a data set: the last part of a path."""
    return Path(os.path.abspath(dataset)).name or dataset


def build_config(
    flags: dict[str, Any] | None = None,
    overlay: dict[str, Any] | None = None,
    model: str | None = None,
) -> Config:
    """The settings of one run: `overlay` from a YAML file, `flags` from the command line, both by
    dotted key; `model` picks the presets where `run.model` names several.

    Raises ConfigError on the first setting that cannot be.
    """
    flags, overlay = flags or {}, overlay or {}
    asked = overlay | flags
    mode = str(asked.get("run.mode", Run.mode))
    by_mode = MODE_DEFAULTS.get(mode, {})
    dataset = str(asked.get("data.dataset", Data.dataset))
    name = dataset_name(dataset)
    if name == "mock" != dataset:
        name = ""  # a folder of that name holds something else
    by_data = MODEL_PRESETS.get(model or str(asked.get("run.model", Run.model)), {})
    # an edition has the presets of the folder it is unpacked to
    edition = asked.get("data.edition") if dataset == "movielens" else None
    presets = DATASET_PRESETS.get(name, {}) | by_data.get("*", {})
    presets |= by_data.get(str(edition or name), {})
    presets |= MODE_DATA_PRESETS.get((mode, name), {})
    config = Config()
    check_defaults(config, "config.py")
    for source, layer in (
        ("config.py", presets | by_mode if mode in ("quick", "theory") else by_mode | presets),
        ("--config", overlay),
        ("command line", flags),
    ):
        for key, value in layer.items():
            assign(config, key, value, source)
    if model:
        config.run.model = model
    _check_together(config)
    return config


def _check_together(config: Config) -> None:
    if config.run.seed + config.run.seeds - 1 > LAST_SEED:
        raise ConfigError(f"run.seed + run.seeds: no seed may be above {LAST_SEED}.")
    if not config.data.dataset:
        raise ConfigError("data.dataset is empty; name mock, amazon, movielens, mmrec or a folder.")
    if not config.mock.dims:
        raise ConfigError("mock.dims wants at least one modality; data.features=none does without.")
    if config.mock.history_max < config.mock.history_min:
        raise ConfigError("mock.history_max is smaller than mock.history_min.")
    for name, width in config.mock.dims.items():
        if not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)):
            raise ConfigError(f"mock.dims: {name!r} is no name; use letters, digits, - and _.")
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ConfigError(f"mock.dims: {name} wants a width of 1 or more, not {width!r}.")
    for section in dataclasses.fields(config):
        own = getattr(config, section.name)
        if hasattr(own, "heads") and own.width % own.heads:
            raise ConfigError(
                f"{section.name}.width ({own.width}) is no multiple of {section.name}.heads."
            )


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    section, _, leaf = key.partition(".")
    return getattr(getattr(config, section), leaf)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionary, ready for YAML and JSON."""
    return dataclasses.asdict(config)


def differences(config: Config) -> dict[str, Any]:
    """Dotted keys whose value is not the dataclass default: what makes this run special."""
    default, own = to_dict(Config()), to_dict(config)
    return {
        f"{section}.{leaf}": value
        for section, leaves in own.items()
        for leaf, value in leaves.items()
        if value != default[section][leaf]
    }
