"""Run tasks of lm_eval in one process of its own, in three ways, and print what comes of them as JSON.

The first argument is a JSON object: the folder of the tasks, and for each model its bundle and its export.
"""

import json
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, manager

from megakexue.bundle import harness

given = json.loads(sys.argv[1])
tasks, out = Path(given["tasks"]), Path(given["out"])
TASKS = ["own_documents", "own_endings", "own_lines"]


def run(lm: Any) -> dict[str, Any]:
    """By task: the responses to each document, in order, and the metrics."""
    loaded = TaskManager(include_path=str(tasks), include_defaults=False).load(TASKS)
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", 0)
    results = evaluate(lm, loaded, bootstrap_iters=0)
    assert results is not None
    return {
        name: {
            "responses": [sample["resps"] for sample in sorted(results["samples"][name], key=lambda s: s["doc_id"])],
            "metrics": results["results"][name],
        }
        for name in TASKS
    }


found: dict[str, Any] = {}
with redirect_stdout(sys.stderr):
    for name, (bundle, export) in given["models"].items():
        options: dict[str, Any] = dict(device="cpu", dtype="float32", batch_size=3, trust_remote_code=True)
        found[name] = {
            "theirs": run(HFLM(export, **options)),
            "theirs without BOS": run(HFLM(export, add_bos_token=False, **options)),
            "ours": run(harness.BundleLM(bundle, device="cpu")),
            "ours without BOS": run(harness.BundleLM(bundle, device="cpu", add_bos_token=False)),
        }

    bundles = [bundle for bundle, _ in given["models"].values()]
    written = out / "tool.json"
    sys.argv = ["evaluate.py", *bundles, "--tasks", "own_*", "--include", str(tasks), "--json", str(written)]
    sys.argv += ["--device", "cpu", "--cache", str(out / "cache")]
    runpy.run_path(given["tool"], run_name="__main__")
    found["tool"] = json.loads(written.read_text())

    manager.__file__ = str(tasks / "manager.py")  # or the program reads the YAML files of 13,000 tasks of its own
    sys.argv = ["lm_eval", "--model", "megakexue", "--model_args", f"bundle={bundles[0]},batch_tokens=100"]
    sys.argv += ["--tasks", "own_endings", "--output_path", str(out / "program")]
    harness.main()
    (written,) = (out / "program").rglob("*.json")
    found["program"] = json.loads(written.read_text())
print(json.dumps(found))
