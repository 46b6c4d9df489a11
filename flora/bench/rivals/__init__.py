"""What a user would otherwise run: transformers' Trainer and timm's training loop, both with PEFT's LoRA.

Each is a program of its own (``python -m flora.bench.rivals.NAME JOB.json``) that takes nothing from flora but its job
and its clock, so that it pays for no import of ours. scripts/bench_end_to_end.py runs them beside train.py.
"""
