"""A made-up study: random numbers in the form of results.json."""

import math
from typing import Any

import numpy as np

VARIANTS = (
    ("softmax_mha", None),
    ("softmax_gqa", None),
    ("diff_v1", None),
    ("gda", 2),
    ("gda", 4),
    ("gda", 7),
    ("diff_v2", None),
)
TOKENS, STEPS = 4_000_000, 500


def made_up_results(
    *,
    activations: tuple[str, ...] = ("poly_norm",),
    seeds: tuple[int, ...] = (0, 1, 2),
    sizes: tuple[str, ...] = ("2m",),
    shift: float = 0.0,
    failed: tuple[tuple[str, int], ...] = (),
) -> dict[str, Any]:
    """Results of every variant with every seed but the ``failed`` (variant, seed) pairs."""
    variants, runs = [], []
    for size in sizes:
        for activation in activations:
            for i, (attention, ratio) in enumerate(VARIANTS):
                name = f"{attention.replace('softmax_', 'softmax ')}{f' {ratio}:1' if ratio else ''} {activation}"
                variants.append(_variant(name, size, attention, ratio, activation, i))
                for seed in seeds:
                    if (name, seed) in failed:
                        error = "the loss was not finite for 20 steps in a row | <stopped> at step 130"
                        runs.append({"variant": name, "size": size, "seed": seed, "status": "failed", "error": error})
                    else:
                        runs.append(_run(name, size, attention, i, activation, seed, shift))
    return {
        "kind": "head_ratio_study",
        "format": 1,
        "command": "motifarch benchmark head-ratio made_up.yaml --output runs/made_up",
        "environment": {
            "date": "2000-01-01T00:00:00+00:00",
            "device": "cpu",
            "cpu": "a made-up processor",
            "cores": 2,
            "memory_bytes": 8 << 30,
            "versions": {"motifarch": "0.0", "torch": "0.0", "made_up": "yes"},
            "git": {"commit": "0" * 40, "dirty": False},
        },
        "grid": {
            "data": {
                "path": "data/made_up",
                "source": ["made_up"],
                "tokenizer": None,
                "vocab_size": 1024,
                "seq_len": 512,
            },
            "tokens": TOKENS,
            "seeds": list(seeds),
            "variants": [v["name"] for v in variants],
            "made_up": True,
        },
        "matching": {"by": "parameters", "tolerance": 0.01, "reference": "gda 4:1 poly_norm"},
        "variants": variants,
        "runs": runs,
    }


def _variant(name: str, size: str, attention: str, ratio: int | None, activation: str, i: int) -> dict[str, Any]:
    noise = None if attention.startswith("softmax") else 2
    return {
        "name": name,
        "size": size,
        "attention": attention,
        "ratio": ratio or (None if noise is None else 1),
        "activation": activation,
        "model": {
            "attention_type": attention,
            "num_attention_heads": 8 if noise is None else 2 * ((ratio or 1) + 1),
            "num_noise_heads": noise,
            "num_key_value_heads": 4,
            "intermediate_size": 400 - 8 * i,
        },
        "parameters": 2_100_000 + 1300 * i,
        "training_flops_per_token": 1.5e7 + 2e5 * i,
        "kv_bytes_per_token": 2048 if attention == "softmax_mha" else 1024,
        "deviation": 0.0006 * (i - 3),
        "learning_rate": 3e-3,
        "learning_rate_from": "given",
    }


def _run(name: str, size: str, attention: str, i: int, activation: str, seed: int, shift: float) -> dict[str, Any]:
    rng = np.random.default_rng([i, seed, len(activation), len(size)])
    end = 2.6 + (0.03, 0.035, 0.02, 0.006, 0.0, 0.012, 0.01)[i] + 0.02 * (activation == "silu") + shift
    end += 0.015 * math.sin(7 * seed) + 0.003 * rng.standard_normal()
    curve, validation = [], []
    for step in range(5, STEPS + 1, 5):
        loss = end + 5.4 * math.exp(-step / 22) + 0.9 * math.exp(-step / 140)
        at = [step * TOKENS // STEPS, round(step * (1.1 + 0.05 * i), 3)]
        curve.append([*at, loss + 0.05 * float(rng.standard_normal()), 0.4 + 0.1 * float(rng.random())])
        if step % 50 == 0:
            validation.append([*at, loss + 0.02 if step < STEPS else end])
    depths, lengths = [0.1, 0.3, 0.5, 0.7, 0.9], [128, 256, 512]
    accuracy = np.clip(0.25 + 0.1 * i * np.array(depths)[None] / np.arange(1, 4)[:, None], 0, 1)
    accuracy = np.clip(accuracy + 0.03 * rng.standard_normal((3, 5)), 0, 1)
    gain = 0.3 * accuracy + 0.02 * rng.standard_normal((3, 5))
    noise = not attention.startswith("softmax")
    return {
        "variant": name,
        "size": size,
        "seed": seed,
        "status": "finished",
        "error": None,
        "steps": STEPS,
        "tokens": TOKENS,
        "curve": curve,
        "validation": validation,
        "validation_loss": end,
        "probe": {
            "task": 'made-up lines name = "value" in made-up text',
            "lengths": lengths,
            "depths": depths,
            "samples": 64,
            "chance": 0.2,
            "accuracy": accuracy.tolist(),
            "loss": (5 - accuracy).tolist(),
            "gain": gain.tolist(),
            "binding": (gain / 2).tolist(),
            "overall": {
                "accuracy": float(accuracy.mean()),
                "accuracy_error": 0.01,
                "gain": float(gain.mean()),
                "gain_error": 0.004,
                "binding": float(gain.mean()) / 2,
                "binding_error": 0.004,
            },
        },
        "attention": {
            "uniform_first_token_share": 0.02,
            "uniform_entropy": 4.4,
            "layers": [
                {
                    "first_token_share": 0.3 - 0.04 * i + 0.02 * layer + 0.005 * float(rng.standard_normal()),
                    "entropy": 3.2 - 0.2 * layer - 0.1 * i,
                    "cancelled_share": 0.1 * layer if noise else None,
                    "lambda": 0.2 + 0.1 * layer - 0.02 * i if noise else None,
                    "outlier_ratio": 6.0 + 2 * layer - 0.5 * i,
                    "largest_logit": 8.0 + layer,
                }
                for layer in range(6)
            ],
            "gradient_norm_spikes": int(rng.integers(0, 4)),
        },
        "speed": {
            "train_tokens_per_s": 7000 - 200 * i + 100 * float(rng.standard_normal()),
            "model_tflops": 0.1 - 0.002 * i,
            "peak_memory_bytes": (600 + 10 * i) << 20,
            "decode_tokens_per_s": 180 - 5 * i + 3 * float(rng.standard_normal()),
            "prefill_tokens": 512,
            "kv_bytes_per_token": 2048 if attention == "softmax_mha" else 1024,
        },
    }


DESIGNS = {
    "noise_heads": [(2, 2), (8, 2), (14, 2)],
    "signal_heads": [(8, 8), (8, 2), (8, 1)],
    "query_heads": [(8, 8), (12, 4), (14, 2)],
}
"""(Signal, noise) heads by what is held."""


def made_up_designs(
    of_signal: float, of_noise: float, *, scatter: float = 0.002, seeds: tuple[int, ...] = (0, 1, 2)
) -> dict[str, Any]:
    """Results of three designs whose losses change by so many nats for each doubling of heads."""
    results = made_up_results(seeds=seeds)
    results["variants"] = [v for v in results["variants"] if v["attention"] != "gda"]
    runs = [r for r in results["runs"] if not r["variant"].startswith("gda")]
    names = {}
    for i, (signal, noise) in enumerate(dict.fromkeys(heads for rows in DESIGNS.values() for heads in rows)):
        name = names[signal, noise] = f"gda {signal // noise}:1 ({signal}+{noise}) poly_norm"
        variant = _variant(name, "2m", "gda", signal // noise, "poly_norm", i)
        variant["model"] |= {"num_attention_heads": signal + noise, "num_noise_heads": noise}
        results["variants"].append(variant)
        rng = np.random.default_rng([signal, noise])
        for seed in seeds:
            run = _run(name, "2m", "gda", 3, "poly_norm", seed, 0.0)
            loss = 2.6 + of_signal * math.log2(signal) + of_noise * math.log2(noise) + 0.01 * math.sin(7 * seed)
            runs.append(run | {"validation_loss": loss + scatter * float(rng.standard_normal())})
    results["runs"] = runs
    results["designs"] = [
        {"name": f"{fixed}", "fixed": fixed, "makes_up": "feed_forward", "variants": [names[heads] for heads in rows]}
        for fixed, rows in DESIGNS.items()
    ]
    return results
