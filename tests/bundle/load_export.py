"""Load exports as their users do, without anything of ours, and print what they compute as JSON.

The first argument is a JSON list of folders; the second one is the prompts: rows of ids, padded at the left, their
mask, whole rows, and the number of tokens to generate.
"""

import json
import sys

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

folders, given = json.loads(sys.argv[1]), json.loads(sys.argv[2])
rows, mask, whole = (torch.tensor(given[name]) for name in ("rows", "mask", "whole"))
found = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    texts = {}
    for cache in ("dynamic", "static"):
        options = {"max_new_tokens": given["n_tokens"], "do_sample": False, "cache_implementation": cache}
        try:
            texts[cache] = model.generate(rows, attention_mask=mask, **options)[:, rows.shape[1] :].tolist()
        except RuntimeError as error:
            texts[cache] = str(error)
    with torch.no_grad():
        logits = model(whole).logits
        of_base = model.lm_head(base(whole)[0])
        half = model.to(torch.bfloat16)(whole).logits.float()
    found[folder] = {
        "version": transformers.__version__, "class": type(model).__name__, "texts": texts, "logits": logits.tolist(),
        "base": (of_base - logits).abs().max().item(),
        "half": ((half - logits).square().mean().sqrt() / logits.std()).item(),
        "ids": tokenizer(given["texts"])["input_ids"], "keys": sorted(tokenizer("a")),
        "decoded": tokenizer.batch_decode(tokenizer(given["texts"])["input_ids"], skip_special_tokens=True),
    }  # fmt: skip
assert "megakexue" not in sys.modules
print(json.dumps(found))
