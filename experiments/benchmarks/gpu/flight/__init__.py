"""Runs on a machine with a GPU, which comes seldom and for minutes: what they measure, in the order of its worth.

`python -m experiments.benchmarks.gpu.flight prepare` compiles ahead, without a GPU; `… 1`, `2` and `3` measure, each
within its limit (`fly`); `… summary` prints what came back. experiments/README.md says how each is used.

1, raw: `pieces` and `bandwidth` are what is launched, `plan` for which shapes and tilings, `ahead` compiles it, `raw`
launches it by the `driver` alone on `memory`, checks it against `operands` in float64 and times it beside `baselines`.
2, through jax: `side_by_side` has a process for each implementation (`layers`) and each training step (`steps`).
3: 1 again, and the kernels under compute-sanitizer, and for equal bits.
What is found goes to lines of JSON as it comes (`framework/lines.py`); `summary` reads them.
"""
