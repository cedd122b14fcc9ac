#!/usr/bin/env python
"""Make a bundle of a Hugging Face model (config.json and safetensors) or of a GGUF file, and compare the two."""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakexue import __version__, buckets
from megakexue.config import UserError, require, run_program
from megakexue.files import read_json, sha256, temporary_folder

if TYPE_CHECKING:
    from torch import Tensor

    from megakexue.config import ResolvedModel

N_TOKENS = 512
"""Of the comparison: two rows, so that a batch is under test."""
N_CACHED = 16
"""Of these, at the end of each row, are fed one by one."""
BOUND = 1e-4
"""Of the logits' deviation: what float32 may differ by."""

EPILOG = """\
SOURCE is a folder that save_pretrained of transformers wrote, or a .gguf file, whose quantised tensors become float32.
Families: Llama 2 and 3, SmolLM2, Mistral without a sliding window, Qwen2 and 2.5, Qwen3, Granite, MiniCPM3, DeepSeek-V3
with all layers dense; GGUF: llama, qwen2 and qwen3. A key of config.json that our decoder does not have is refused by
its name. Nothing is unpickled, and no code of the folder runs.

At the end both models compute the float32 logits of the same text, transformers as a whole and ours with and without a
cache; where they differ, nothing is left. This needs transformers (for MiniCPM3 version 5), and memory for both;
--no-check leaves it out.

SOURCE may be in a bucket (s3://, gs://, oci://), with the credentials that remote data takes. Its files are
copied to TMPDIR first.

The bundle trains, grows, generates and evaluates as any other. Its config.yaml has the model section for your config.

examples:
  tools/import_hf.py models/SmolLM2-135M --out bundles/smollm2
  tools/import_hf.py models/Qwen3-8B --out bundles/qwen3 --text data/some.txt
  tools/import_hf.py s3://bucket/models/Qwen3-8B --out bundles/qwen3
  tools/import_hf.py model.Q4_1.gguf --tokenizer models/SmolLM2-135M/tokenizer.json --out bundles/smollm2
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder or a .gguf file, local or in a bucket")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder to write")
    parser.add_argument(
        "--dtype", choices=("stored", "fp32", "bf16", "fp16"), default="stored",
        help="of the bundle (default: as SOURCE has them; float32 where a multiplier goes into a weight)",
    )  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or tokenizer.model (default: that of SOURCE)")
    parser.add_argument("--text", type=Path, help="of the comparison (default: English prose of Python's own help)")
    parser.add_argument("--no-check", action="store_true", help="do not compare the logits with transformers")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    args = parser.parse_intermixed_args()
    if buckets.is_remote(args.source):
        buckets.check_scheme(args.source)
    else:
        require(Path(args.source).exists(), f"no file or folder {args.source}")
    require(args.text is None or args.text.is_file(), f"--text {args.text}: no such file")
    require(args.overwrite or not args.out.exists(), f"{args.out} exists: choose another name, or add --overwrite")
    return args


def main() -> None:
    args = parse_arguments()
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers has a bar for each GGUF file; it is read on import

    # seconds of imports, which a mistake in the arguments should not cost
    from megakexue.bundle.bundle import check_out, write_bundle
    from megakexue.bundle.hf_import import Gguf, open_source, resolved, weights
    from megakexue.bundle.imported_tokenizer import tokenizer_of
    from megakexue.core.costs import n_parameters
    from megakexue.core.device import DTYPES
    from megakexue.text.tokenizer_files import load_tokenizer

    check_out(args.out, args.overwrite)
    with temporary_folder() as folder:
        path = fetched(args.source, folder) if buckets.is_remote(args.source) else Path(args.source)
        source = open_source(path)
        config = resolved(source)
        metadata = source.metadata if isinstance(source, Gguf) else None
        tokenizer = tokenizer_of(path, args.tokenizer, metadata, folder)
        require(
            (vocab_size := load_tokenizer(tokenizer).vocab_size) <= config.vocab_size,
            f"{tokenizer} has {vocab_size} ids, and the embedding {config.vocab_size} rows: name the tokenizer that "
            "the model was trained with (--tokenizer)",
        )
        parts = weights(source, config)
        lineage: dict[str, Any] = {
            "from": "hugging face", "source": args.source, "family": source.imported.family,
            "hash": sha256(path / "config.json" if path.is_dir() else path), "step": None,
            "tokens": None, "data": None, "megakexue": __version__,
        }  # fmt: skip
        if not args.no_check:
            require_class(source.imported.family)
            parts = checked(parts, config, path, real_ids(tokenizer, args.text), lineage)
        dtype = DTYPES.get(args.dtype)
        if dtype is not None:  # after the comparison, which is of the weights as they are stored
            parts = ((name, weight.to(dtype)) for name, weight in parts)
        write_bundle(args.out, config, parts, tokenizer, lineage, overwrite=args.overwrite)
    n_bytes = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {source.imported.family}, {n_parameters(config):,} parameters, {n_bytes:,} bytes")
    print(f"tokenizer: {tokenizer.name}; to train it: `model: {{from: bundle}}` and `train: {{init_from: {args.out}}}`")


def fetched(source: str, folder: Path) -> Path:
    """Copy what import reads from a bucket into `folder`; return that, or the GGUF file in it."""
    from megakexue.bundle.imported_tokenizer import TOKENIZERS
    from megakexue.text.tokenizer_json import CONFIG

    index = "model.safetensors.index.json"
    parent, _, last = source.rstrip("/").rpartition("/")
    if last.endswith(".gguf"):
        names = [last]
    else:
        parent = f"{parent}/{last}"
        buckets.fetch(f"{parent}/config.json", folder / "config.json")
        names = ["model.safetensors"]
        if buckets.fetch(f"{parent}/{index}", folder / index, may_be_absent=True):
            named = read_json(folder / index, "the index of weights").get("weight_map")
            named = set(named.values()) if isinstance(named, dict) else set()
            # what is no name of a file in this folder is refused with the index
            names = sorted(name for name in named if isinstance(name, str) and Path(name).name == name)
    for name in names:
        if sys.stderr.isatty():
            print(f"copying {parent}/{name}", file=sys.stderr)
        buckets.fetch(f"{parent}/{name}", folder / name)
    for name in (*TOKENIZERS, CONFIG, "generation_config.json"):
        buckets.fetch(f"{parent}/{name}", folder / name, may_be_absent=True)
    return folder / last if last.endswith(".gguf") else folder


def real_ids(tokenizer: Path, text: Path | None) -> "Tensor":
    """Return [2, n] ids of real text."""
    import torch

    from megakexue.text.tokenizer_files import load_tokenizer

    if text is None:
        from pydoc_data.topics import topics

        content = "\n".join(topics.values())
    else:
        content = text.read_text(encoding="utf-8", errors="replace")
    content = content[: 40 * N_TOKENS]
    ids = load_tokenizer(tokenizer).encode(content)
    n = min(N_TOKENS, len(ids)) // 2
    require(n > N_CACHED, f"--text {text or ''} has {len(ids)} tokens, too few for a comparison: name a longer one")
    return torch.tensor(ids[: 2 * n]).view(2, n)


def checked(
    parts: "Iterator[tuple[str, Tensor]]", config: "ResolvedModel", path: Path, ids: "Tensor", lineage: dict[str, Any]
) -> "Iterator[tuple[str, Tensor]]":
    """Pass the parameters on, and then compare the logits of both models; what came of it goes into the lineage.

    Raises:
        UserError: they differ by more than rounding. So `write_bundle`, which asks for the last one, writes nothing.
    """
    import torch

    from megakexue.core.decoder import Decoder

    with torch.device("meta"):
        decoder = Decoder(config, "sdpa")
    own = {}
    for name, weight in parts:
        own[name] = weight
        yield name, weight
    decoder.load_state_dict(own | ({"head.weight": own["embedding.weight"]} if config.tie_embeddings else {}),
                            assign=True)  # fmt: skip
    theirs, ours = logits_of_transformers(path, ids), own_logits(decoder.float().eval(), ids)
    deviation = float(theirs.std())
    found = {how: float((x - theirs).abs().max()) for how, x in ours.items()}
    same = float((ours["whole"].argmax(-1) == theirs.argmax(-1)).double().mean())
    said = ", ".join(f"{how} {x:.2e}" for how, x in found.items())
    print(
        f"{ids.numel()} tokens' float32 logits differ from transformers' by at most: {said} (bound "
        f"{BOUND * deviation:.2e}, deviation {deviation:.3g}); the best token is the same for {same:.2%}"
    )
    require(
        max(found.values()) <= BOUND * deviation,
        f"the imported model is not the one of {path}: its logits differ by {max(found.values()):.2e}, more than "
        f"{BOUND * deviation:.2e}; nothing is written: report the config.json",
    )
    lineage["verified"] = {"tokens": ids.numel(), "deviation": deviation, "argmax_equal": same, **found}


def require_class(family: str) -> None:
    """Refuse a comparison for which transformers is missing or too old, before a weight is read. Raises UserError."""
    try:
        from transformers import __version__ as version
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise UserError(f"the comparison needs megakexue[hf] ({error}): install it, or add --no-check") from error
    require(
        family in CONFIG_MAPPING,
        f"transformers {version} has no class for {family}, and no code of a folder is run: run this program with a "
        "Python that has transformers 5, or add --no-check",
    )


def logits_of_transformers(path: Path, ids: "Tensor") -> "Tensor":
    """Return the float32 logits of transformers' class. Raises UserError: it cannot read the model."""
    import torch

    try:
        model = load_transformers(path).eval()
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"transformers cannot read {path}, so that there is no comparison: {text}") from error
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def load_transformers(path: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = dict(dtype=torch.float32, attn_implementation="eager", trust_remote_code=False)
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, use_safetensors=True, **options)
    # not by from_pretrained, which wants another package for GGUF files
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, **options)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(tensors, strict=False)
    spare = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if {*left.missing_keys, *left.unexpected_keys} - spare:
        raise ValueError(f"its tensors are not those of {type(model).__name__}")
    return model


def own_logits(decoder: Any, ids: "Tensor") -> "dict[str, Tensor]":
    """Return the logits of all tokens: of whole rows, and of a prompt and single tokens after it."""
    import torch

    from megakexue.core.decoder import Cache

    t, positions = ids.shape[1], torch.arange(ids.shape[1]).expand_as(ids)
    caches, starts = [Cache() for _ in decoder.blocks], [0, *range(t - N_CACHED, t + 1)]
    with torch.no_grad():
        parts = [decoder(ids[:, a:b], positions[:, a:b], caches=caches, n_positions=b) for a, b in pairwise(starts)]
        return {"whole": decoder(ids, positions), "cached": torch.cat(parts, dim=1)}


if __name__ == "__main__":
    run_program(main)
