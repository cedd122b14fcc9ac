"""The weights of a Hugging Face folder or a GGUF file, as parameters of ours, tensor by tensor.

What must stay true: files are safetensors or GGUF, so that nothing is unpickled, and no code of the folder runs; every
tensor of the files is used, or refused by its name; a weight that is not multiplied keeps its bits.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megakexue.bundle.families import head_rows, is_rotated, our_weight, their_names, unpermuted
from megakexue.bundle.hf_config import read_config
from megakexue.config import ResolvedModel, UserError, require
from megakexue.core.axes import parameter_names, shape
from megakexue.core.resolve import resolve
from megakexue.files import read_json

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Folder:
    """A folder with config.json and safetensors files.

    Raises:
        UserError: a file is missing or damaged, or the model is not one that import takes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = path / "config.json"
        require(
            config.is_file(),
            f"no file {config}: name a folder that transformers' save_pretrained wrote, or a .gguf file",
        )
        self.imported = read_config(read_json(config, "the model's config"), str(config))
        self._files = self._find_files()

    def _find_files(self) -> dict[str, Path]:
        """Return the file of each tensor."""
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        require(
            index.is_file() or single.is_file(),
            f"{self.path} has no model.safetensors and no model.safetensors.index.json: other formats run code when "
            "they are read, so convert it first (save_pretrained of transformers writes safetensors)",
        )
        files = [single.name]
        if not single.is_file():
            entries = read_json(index, "the names of the tensors").get("weight_map")
            named: list[Any] = [*entries.values()] if isinstance(entries, dict) else [None]
            require(
                all(isinstance(name, str) for name in named), f"{index} has no weight_map of names: download it again"
            )
            files = sorted(set(named))
            strange = [name for name in files if Path(name).name != name]
            require(not strange, f"{index} names {strange[:1]}, which is no file of its folder")
        found: dict[str, Path] = {}
        for name in files:
            path = self.path / name
            require(path.is_file(), f"{path} is missing: download it again")
            try:
                with safe_open(path, framework="pt") as file:
                    found |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise UserError(f"{path} is no whole safetensors file ({error}): download it again") from error
        return found

    def names(self) -> set[str]:
        """Of all tensors in its files."""
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


GGUF_KINDS = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""By general.architecture: the model_type. Mistral without a window and SmolLM2 are `llama` there."""
GGUF_KEYS = {
    "embedding_length": "hidden_size", "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings", "rope.freq_base": "rope_theta",
}  # fmt: skip
"""Of metadata, without the architecture in front: the key of config.json."""
GGUF_NAMES = {
    "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight", "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight", "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight", "attn_k_norm.weight": "self_attn.k_norm.weight",
    **{f"attn_{x}.{part}": f"self_attn.{x}_proj.{part}" for x in "qkv" for part in ("weight", "bias")},
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}  # fmt: skip
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every Llama 3.1 and 3.2. A GGUF file has only what comes of them, so they are checked against that."""


class Gguf:
    """A GGUF file; quantised tensors become float32. Only the package `gguf` reads it.

    Raises:
        UserError: the package is missing, the file is damaged, or the model is not one that import takes.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise UserError("GGUF files need the package gguf: pip install 'megakexue[hf]'") from error
        self.path, self._gguf = path, gguf
        try:
            reader = gguf.GGUFReader(path)
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise UserError(f"{path} is no whole GGUF file ({error}): download it again") from error
        self._tensors = {_theirs(tensor.name): tensor for tensor in reader.tensors}
        values = self._config()
        self.imported = read_config(values, str(path))
        self._is_permuted = values["model_type"] == "llama"
        if "rope_freqs.weight" in self._tensors:
            self._check_factors()

    def _config(self) -> dict[str, Any]:
        """Return what config.json would say."""
        kind = self.metadata.get("general.architecture")
        require(
            kind in GGUF_KINDS,
            f"{self.path}: general.architecture={kind} is not supported: import takes {', '.join(GGUF_KINDS)}",
        )
        require(self.metadata.get("split.count", 1) == 1, f"{self.path} is one of several files: join them first")
        values: dict[str, Any] = {"model_type": GGUF_KINDS[str(kind)]}
        own = {k.removeprefix(f"{kind}."): v for k, v in self.metadata.items() if k.startswith(f"{kind}.")}
        for key in ("embedding_length", "block_count", "feed_forward_length", "attention.head_count", "context_length"):
            is_whole = isinstance(own.get(key), int | np.integer)
            require(is_whole, f"{self.path}: {kind}.{key}={own.get(key)} must be a whole number")
        require(
            "model.embed_tokens.weight" in self._tensors, f"{self.path} has no token_embd.weight: it is no whole model"
        )
        width = own.get("attention.key_length", own["embedding_length"] // max(1, own["attention.head_count"]))
        # what has no key in config.json, and the one value that it may have
        fixed = {
            "vocab_size": self._tensors["model.embed_tokens.weight"].data.shape[0], "rope.dimension_count": width,
            "attention.value_length": width, "rope.scaling.type": "none", "rope.scaling.finetuned": False,
        }  # fmt: skip
        for key, value in own.items():
            if key in GGUF_KEYS:
                values[GGUF_KEYS[key]] = float(str(value)) if isinstance(value, np.floating) else value
            else:
                require(
                    key in fixed and value == fixed[key],
                    f"{self.path}: {kind}.{key}={value} is not supported: import does not know what it changes",
                )
        for key in ("rms_norm_eps", "rope_theta"):
            if key in values:  # stored in float32, and meant as 1e-05
                values[key] = float(str(np.float32(values[key])))
        values |= {"vocab_size": fixed["vocab_size"], "head_dim": width}
        values["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        if "rope_freqs.weight" in self._tensors:
            factor = float(self._factors.max())
            values["rope_scaling"] = {"rope_type": "llama3", "factor": factor} | LLAMA3
        return values

    @cached_property
    def _factors(self) -> np.ndarray:
        """What each frequency is divided by."""
        return np.asarray(self._tensors["rope_freqs.weight"].data, np.float64)

    def _check_factors(self) -> None:
        from megakexue.core.bases import powers
        from megakexue.core.rope import frequencies

        model = resolve(self.imported.model, "adamw", self.imported.context)
        expected = powers(model.rope.base, model.rotary_width) / frequencies(model.rope, model.rotary_width)
        require(
            expected.shape == self._factors.shape and bool(np.allclose(expected, self._factors, rtol=1e-5)),
            f"{self.path}: rope_freqs.weight is not that of Llama 3.1 ({LLAMA3}): it is not supported",
        )

    def names(self) -> set[str]:
        """Of all tensors in the file, as transformers calls them."""
        return set(self._tensors) - {"rope_freqs.weight"}

    def read(self, name: str) -> Tensor:
        """Return a tensor by the name that transformers has for it, float32."""
        tensor = self._tensors[name]
        values = torch.from_numpy(np.array(self._gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32))
        if self._is_permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            width = self.imported.model.head_width
            return unpermuted(values, width, width)
        return values


def _theirs(name: str) -> str:
    """Return the name in transformers of a tensor of a GGUF file; one that it does not know stays as it is."""
    found = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if found:
        return f"model.layers.{found[1]}.{GGUF_NAMES.get(found[2], found[2])}"
    return GGUF_NAMES.get(name, name)


Source = Folder | Gguf


def open_source(path: Path) -> Source:
    """Open a folder or a GGUF file. Raises UserError: it is neither, or not one that import takes."""
    require(path.exists(), f"no file or folder {path}")
    return Folder(path) if path.is_dir() else Gguf(path)


def resolved(source: Source) -> ResolvedModel:
    """Return the model section of the bundle, after a look at the names and shapes of all tensors.

    Raises:
        UserError: a tensor is missing, is one too many, or has another shape or kind of numbers.
    """
    imported = source.imported
    config = resolve(imported.model, "adamw", imported.context)
    expected, found = set(their_names(config)), source.names()
    missing, unknown = sorted(expected - found), sorted(found - expected)
    unknown = [name for name in unknown if not _is_spare(name, config)]
    kind, where = f"a {imported.family} model of these sizes", source.path
    require(not missing, f"{where} has no tensor {missing[:1]} ({len(missing)} are missing): this is not {kind}")
    require(
        not unknown,
        f"{where} has the tensor {unknown[:1]} ({len(unknown)} are too many), which is not supported: {kind} has none "
        "of this name",
    )
    return config


def _is_spare(name: str, config: ResolvedModel) -> bool:
    """Whether transformers ignores a tensor too: a tied head, which is the embedding, and angles of old versions."""
    return (name == "lm_head.weight" and config.tie_embeddings) or name.endswith("rotary_emb.inv_freq")


def weights(source: Source, config: ResolvedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of ours, as it is stored (float32 if it has to be multiplied).

    Raises:
        UserError: a tensor has another shape than config.json says, or is quantised.
    """
    imported, where = source.imported, source.path
    for name in parameter_names(config):
        try:
            weight = our_weight(name, config, source.read)
        except (RuntimeError, SafetensorError) as error:
            raise UserError(f"{where}: the tensor of {name} is unreadable: {' '.join(str(error).split())}") from error
        size = shape(name, config)
        require(
            tuple(weight.shape) == size,
            f"{where}: the tensor of {name} has the shape {tuple(weight.shape)}, and its config says {size}",
        )
        kind = str(weight.dtype).removeprefix("torch.")
        require(weight.dtype in FLOATS, f"{where}: the tensor of {name} is quantised ({kind}): dequantise it first")
        if imported.is_interleaved and is_rotated(name):
            weight = unpermuted(weight, *head_rows(name, config))
        if imported.branch != 1 and name.endswith(("attention.wo", "feed_forward.w_down")):
            weight = (weight.double() * imported.branch).float()
        yield name, weight
