"""What a search finds beside what was found by hand: python benchmarks/tune.py {npo,ssd,diffusion}

npo: the 9M-parameter Llama that memorised TOFU forgets forget01, 40 records, so that 30 trials need
no GPU (or another --split), beside a model trained without forget10, which never saw those either.
ssd: a ResNet forgets the class cat of CIFAR-10, beside a model retrained without cats.
diffusion: a model of 8x8 digits, trained on the spot, forgets the digit 3 by npo, as a judge sees.

`unlearn tune` gets the trials that --trials names (30); the recipe by hand, which was found with
other numbers, is shipped with the method (of npo: for forget10; of diffusion: that of
benchmarks/diffusion.py). Both are judged as trials are (evaluations/trials.py), and once more from
another seed, which the search never saw. Of the retain set --retained records (2,000) are kept, of
the holdout 1,000, for all of them; training reads no others. Killed, the same command goes on (with
--out).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml
from common import bench_data, publish

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from unlearn import registry  # noqa: E402
from unlearn.cli.console import Plain, stderr  # noqa: E402
from unlearn.config import RunConfig, configure  # noqa: E402
from unlearn.evaluations import tune  # noqa: E402
from unlearn.evaluations.objectives import Objectives  # noqa: E402
from unlearn.evaluations.trials import Trying  # noqa: E402
from unlearn.evaluations.tuned import Row, best  # noqa: E402
from unlearn.plan import plan  # noqa: E402
from unlearn.run import execute  # noqa: E402

RECIPES = ROOT / "unlearn/recipes"
HELD = 1000  # records of the holdout
COLUMNS = ["settings", "forgetting", "utility", "forgetting, new seed", "utility, new seed",
           "trials", "seconds"]  # fmt: skip
RANGES: dict[str, Any] = {"epochs": "1.0:10.0:log"}  # the recipes by hand take 8 and 10
Settings = dict[str, Any]


def shipped(name: str) -> Settings:
    """The hyperparameters of a recipe."""
    return dict(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()).get("set") or {})


def of_npo(folder: Path, retained: int, split: str) -> tuple[str, Settings, Settings, Settings]:
    """(method, request, what every trial shares, recipe by hand) on TOFU."""
    root = bench_data()
    rest = f"retain{100 - int(split[-2:])}"
    kept = [json.loads(line) for line in (root / f"data/tofu/{rest}.json").open()]
    request = {
        "checkpoint": root / "models/tofu-llama-9m/full",
        "retrained": root / "models/tofu-llama-9m/retain90",
        "forget": root / f"data/tofu/{split}.json",
        "retain": random.Random(0).sample(kept, min(retained, len(kept))),
    }
    return "npo", request, {"precision": "bf16", "schedule": "linear"}, shipped("npo-tofu-llama-9m")


def of_ssd(folder: Path, retained: int, split: str) -> tuple[str, Settings, Settings, Settings]:
    """The same on CIFAR-10."""
    from vision import CAT, images

    root, (pixels, labels) = bench_data() / "models/cifar10-resnet", images("train")
    draw = random.Random(0)
    gone = (labels == CAT).nonzero().flatten().tolist()
    kept = draw.sample((labels != CAT).nonzero().flatten().tolist(), retained)
    # the share of cats stays what it is, which the threshold of ssd goes by
    rows = sorted(
        [*draw.sample(gone, round(retained * len(gone) / (len(labels) - len(gone)))), *kept]
    )
    unseen = [part[:HELD] for part in images("test")]
    request = {
        "checkpoint": root / "full", "retrained": root / "without-cat",
        "data": (pixels[rows], labels[rows]), "holdout": tuple(unseen), "forget_classes": "cat",
    }  # fmt: skip
    return "ssd", request, {}, shipped("ssd-class-cifar10-resnet")


def of_diffusion(
    folder: Path, retained: int, split: str
) -> tuple[str, Settings, Settings, Settings]:
    """The same on digits."""
    from diffusion import ADAM, FORGOTTEN, ON_DIGITS

    from tests import digits

    start = folder / "digits"
    if not start.exists():
        digits.save(digits.trained(1000), folder / "unfinished")
        (folder / "unfinished").rename(start)
    request = {
        "checkpoint": start, "data": digits.records(min(retained, 600)),
        "forget_classes": str(FORGOTTEN), "anchor": "5",
        "sampling": {"images": 32, "steps": 10, "guidance": 2.0},
    }  # fmt: skip
    return "npo", request, ADAM, ON_DIGITS["npo"]


WORLDS = {"npo": of_npo, "ssd": of_ssd, "diffusion": of_diffusion}


def judged(method: str, request: Settings, settings: Settings, seed: int) -> Objectives:
    """What one run is worth, by the objectives of the search."""
    asked = {**request, "method": method, "set": settings, "seed": seed, "audit": "quick"}
    planned = plan(configure(RunConfig, **asked))
    found: Objectives = execute(planned, Trying(planned), Plain(stderr())).report
    return found


def main() -> None:
    """Search, judge, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--retained", type=int, default=2000)
    parser.add_argument("--split", choices=("forget01", "forget05", "forget10"), default="forget01")
    parser.add_argument("--out", type=Path, help="keeps what was done so far")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        folder.mkdir(exist_ok=True)
        method, request, shared, by_hand = WORLDS[given.world](folder, given.retained, given.split)
        start = perf_counter()
        done = tune(
            **request, method=method, set=shared, trials=given.trials, out=folder / given.world,
            range=RANGES if method == "npo" else {}, progress=Plain(stderr()),
        )  # fmt: skip
        spent = perf_counter() - start
        hand = {**shared, **by_hand}
        defaults = next((r for r in done.rows if r.origin == "defaults"), None)
        found = best([r for r in done.rows if r.origin == "search"])
        chosen: dict[str, Row | None] = {"defaults": defaults, "best of the proposals": found,
                                         "best of the search": done.best}  # fmt: skip
        tried = {
            "by hand": (hand, judged(method, request, hand, 0)),
            **{name: (dict(r.settings), r.objectives) for name, r in chosen.items() if r},
        }
        rows = []
        for name, (settings, old) in tried.items():
            new = judged(method, request, settings, 1)
            searched = name.startswith("best")
            rows.append({
                "settings": name, "forgetting": old.forgetting, "utility": old.utility,
                "forgetting, new seed": new.forgetting, "utility, new seed": new.utility,
                "trials": len(done.rows) if searched else 1, "seconds": spent if searched else None,
                "values": registry.values(registry.build(method, settings)),
                "parts": dict(old.parts),
            })  # fmt: skip
        for row in rows:
            print(json.dumps(row))
        publish(f"tune_{given.world}", COLUMNS, rows)


if __name__ == "__main__":
    main()
