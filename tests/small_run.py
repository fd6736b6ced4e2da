"""A training run small enough to repeat on every kind of process, and how to start its ranks.

Model, text, batches and every rate are written out here: what the lessons choose by rule may change
without changing these runs. The files in fixtures/ were made by them, so they should stay.
"""
import gc
import multiprocessing
import threading
from datetime import timedelta
from types import FunctionType

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat_nb.dataloader import PackedLoader
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.optimizer import (POLAR_EXPRESS, lr_schedule, momentum_schedule,
                                   setup_optimizer)
from nanochat_nb.pretraining import train_step

# ------------------------------------------------------------------------------- text

WHO = ("the miller", "a heron", "her sister", "an old tram", "our cook")
DID = ("carried", "forgot", "painted", "counted")
WHAT = ("seven plums", "the river", "a brass bell", "two maps", "every lamp", "his letter")


def sentences(i: int) -> str:
    "Document number i: 2 to 9 sentences, a recipe without chance."
    return " ".join(f"{WHO[(i + k) % 5]} {DID[(i * k + k) % 4]} {WHAT[(i + k * k) % 6]}."
                    for k in range(2 + i * 5 % 8))


DOCUMENTS = [sentences(i) for i in range(36)]


class Letters:
    "A tokenizer that knows small letters, space and full stop."
    bos, vocab_size = 0, 32
    alphabet = "abcdefghijklmnopqrstuvwxyz ."

    def encode_arrays(self, texts) -> list[np.ndarray]:
        return [np.array([1 + self.alphabet.index(c) for c in text]) for text in texts]

    def fingerprint(self) -> str:
        return self.alphabet


# -------------------------------------------------------------------------------- run

STEPS, ROWS, T = 50, 12, 24          # a whole run, rows of a step on all ranks together, tokens
CONFIG = GPTConfig(sequence_len=T, vocab_size=32, n_layer=2, n_head=2, n_kv_head=1, n_embd=32,
                   value_embeds=True, residual_scalars=True, smear=True, backout=True)


def small_model(dtype=torch.float32, seed=0, **changes) -> GPT:
    model = GPT(GPTConfig(**{**CONFIG.to_dict(), **changes})).init_weights(seed).to(dtype)
    model.compute_dtype = dtype
    return model


RATES = {"wte": 0.1, "value_embed": 0.05, "lm_head": 0.01, "x0_lambdas": 0.05,
         "resid_lambdas": 0.0005, "smear": 0.02, ".h.": 0.01}     # a group's first name holds one


def small_optimizer(model, rank=0, world_size=1):
    optimizer = setup_optimizer(model, weight_decay=0.1, cautious=True, ns_dtype=None,
                                polynomials=POLAR_EXPRESS, beta2=0.9, rank=rank,
                                world_size=world_size)
    for group in optimizer.param_groups:
        first_name = group["params"][0][0]
        group["lr"] = next(rate for part, rate in RATES.items() if part in first_name)
    return optimizer


def small_loader(rank=0, world_size=1, rows=ROWS, state=None) -> PackedLoader:
    "Micro-batches of `rows` rows on all ranks together; an epoch is about 20 steps."
    return PackedLoader(DOCUMENTS, Letters(), rows // world_size, T, rank, world_size, state=state,
                        seed=3, window=16)


def masked(batch):
    "Nobody learns what follows a space: so rows have unequal numbers of targets, wherever they go."
    inputs, targets = batch
    return inputs, targets.masked_fill(inputs == 1 + Letters.alphabet.index(" "), -1)


def train(model, optimizer, loader, start, stop) -> list[float]:
    "The losses of steps start … stop − 1 of a run of `STEPS`, whose rates and momentum change."
    micro = ROWS // (loader.B * loader.world_size)
    losses = []
    for step in range(start, stop):
        batches = [masked(next(loader)) for _ in range(micro)]
        loss, *_ = train_step(model, optimizer, batches,
                              lr_multiplier=lr_schedule(step, STEPS, 0.1, 0.4, 0.1),
                              muon_momentum=momentum_schedule(step, 10), max_norm=0.5)
        losses.append(loss)
    return losses


# ------------------------------------------------------------------------------ ranks

def start_ranks(function, world_size, folder, *args) -> None:
    "`function(rank, world_size, folder, *args)` in processes that share a gloo group."
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():      # torch is imported once
        multiprocessing.set_forkserver_preload(["small_run", "hypothesis", "pytest"])
        method = "forkserver"
    mp.start_processes(_rank, (function, world_size, folder, *args), world_size,
                       start_method=method)


def _rank(rank, function, world_size, folder, *args) -> None:
    torch.set_num_threads(1)
    name = f"{function.__name__}-{world_size}"
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank,
                            world_size=world_size, timeout=timedelta(seconds=300))
    function(rank, world_size, folder, *args)
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()        # torch 2.13 with gloo aborts at exit unless the group is collected now


def record_collectives() -> list[str]:
    "From now on, the collectives this process starts, from which thread, and what they carry."
    calls = []

    def described(value):
        if torch.is_tensor(value):
            return f"{tuple(value.shape)} {value.dtype}"
        return f"{len(value)} objects" if isinstance(value, list) else str(type(value).__name__)

    def recorded(name, function):
        def call(*args, **kwargs):
            where = "" if threading.current_thread() is threading.main_thread() else "a thread: "
            what = [described(value) for value in (*args, *kwargs.values())]
            calls.append(f"{where}{name} {', '.join(what)}")
            return function(*args, **kwargs)
        return call

    words = ("reduce", "gather", "scatter", "broadcast", "barrier", "all_to_all", "send", "recv",
             "new_group")
    for name, function in list(vars(dist).items()):
        if type(function) is FunctionType and any(word in name for word in words):
            setattr(dist, name, recorded(name, function))
    return calls
