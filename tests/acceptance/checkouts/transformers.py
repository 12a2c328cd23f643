"""Public language models and vision transformers in flax."""

from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax.core import Tracer

from tests.acceptance.checkouts.checkout import (
    AXIS,
    CAUGHT,
    KEY,
    Case,
    Client,
    array,
    integers,
    load,
    loss_of,
    on_one_device,
)


def split(array: Any, parts: int, axis: int) -> Any:
    """The method ``split``, which arrays had in older releases of JAX."""
    return jnp.split(array, parts, axis)


def nanogpt(folder: Path) -> Case:
    """GPT-2 small; the model returns its loss."""
    del folder
    module = load("model")
    model = module.GPT(module.GPTConfig())
    tokens = integers(12, 1024)

    def run(method: Any, *args: Any, **options: Any) -> Any:
        with mock.patch.object(Tracer, "split", split, create=True):
            return method(*args, **options)

    def loss(params: Any, tokens: Any, targets: Any, key: Any) -> Any:
        options = {"train": True, "targets": targets, "rngs": {"dropout": key}}
        return run(model.apply, {"params": params}, tokens, **options)[1]

    params = jax.eval_shape(
        lambda key, tokens: run(model.init, key, tokens, train=False), KEY, tokens
    )["params"]
    return Case(loss, params, (tokens, tokens, KEY), tokens.size)


def diffusion(folder: Path) -> Case:
    """Diffusion transformer DiT-B/2 on latents; adaptive layer norm."""
    del folder
    train, states = load("train_diffusion"), load("utils.train_state")
    schedule = load("schedulers").GaussianDiffusion(500)
    sizes = {"patch_size": 2, "hidden_size": 768, "depth": 12, "num_heads": 16}
    model = train.DiT(
        **sizes,
        mlp_ratio=4,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=False,
    )

    def step(params: Any, images: Any, labels: Any, key: Any) -> Any:
        state = states.TrainState.create(model, params)
        trainer = train.DiffusionTrainer(
            key, state, state, {"diffusion_timesteps": 500}, schedule
        )
        return train.DiffusionTrainer.update.__wrapped__(trainer, images, labels)

    images, labels = array(64, 32, 32, 4), integers(64)

    def init(key: Any, *inputs: Any) -> Any:
        return model.init({"params": key, "label_dropout": key}, *inputs)

    params = jax.eval_shape(init, KEY, images, labels, labels)["params"]
    return Case(loss_of(step), params, (images, labels, KEY), 64, has_aux=True)


def gpt_jax(folder: Path) -> Case:
    """GPT-2 small with dropout."""
    del folder
    train, config = load("train"), load("model").GPTConfig()
    model = load("model").GPT(config)

    def step(params: Any, tokens: Any, key: Any) -> Any:
        state = train_state.TrainState.create(
            apply_fn=model.apply, params=params, tx=optax.identity()
        )
        return train.train_step.__wrapped__(state, tokens, key)

    params = jax.eval_shape(model.init, KEY)
    tokens = integers(16, config.block_size + 1)
    terms = 16 * config.block_size
    return Case(loss_of(step), params, (tokens, KEY), terms)


def nanodo(folder: Path) -> Case:
    """Decoder in bfloat16, with parameters boxed for sharding."""
    del folder
    module, losses = load("nanodo.model"), load("nanodo.loss")
    config = load("nanodo.configs.default").get_config()
    sizes = config.model
    model = module.TransformerDo(module.DoConfig(**sizes, V=32_101))
    tokens = integers(config.batch_size, sizes.L)

    def loss(params: Any, tokens: Any) -> Any:
        return losses.get_default_loss_fn(tokens, model.apply, config)(params)

    params = jax.eval_shape(model.init, KEY, tokens)["params"]
    return Case(loss, params, (tokens,), tokens.size, has_aux=True)


def vision(name: str, kind: str) -> Any:
    """A network of the vision transformer repository."""

    def make(folder: Path) -> Case:
        del folder
        train, configs = load("vit_jax.train"), load("vit_jax.configs.models")
        config = configs.MODEL_CONFIGS[name]
        model = getattr(load("vit_jax.models"), kind)(num_classes=1000, **config)
        update = train.make_update_fn(
            apply_fn=model.apply, accum_steps=1, tx=optax.identity()
        ).__wrapped__

        def step(params: Any, batch: Any, key: Any) -> Any:
            return update(params, (), batch, key)

        images, labels = array(32, 224, 224, 3), array(32, 1000)
        params = jax.eval_shape(
            lambda key, images: model.init(key, images, train=False), KEY, images
        )["params"]
        batch = {"image": images, "label": labels}
        loss = on_one_device(loss_of(step), "batch")
        return Case(loss, params, (batch, KEY), 32)

    return make


VIT = "google-research/vision_transformer"
CLIENTS = {
    "nanogpt": Client(
        "nanoGPT-jax",
        "cgarciae/nanoGPT-jax",
        ".",
        nanogpt,
        "train.py trains when imported: the model called as its loss_fn calls it; "
        "the method split given back to arrays",
    ),
    "dit": Client(
        "jax-diffusion-transformer",
        "kvfrans/jax-diffusion-transformer",
        ".",
        diffusion,
        f"{CAUGHT}; the sizes of its DiT-B",
    ),
    "gpt_jax": Client("gpt-jax", "jenkspt/gpt-jax", ".", gpt_jax, CAUGHT),
    "nanodo": Client("nanodo", "google-deepmind/nanodo", ".", nanodo, "32,101 words"),
    "vit_b16": Client(
        "ViT-B/16",
        VIT,
        ".",
        vision("ViT-B_16", "VisionTransformer"),
        f"{CAUGHT}; {AXIS}",
    ),
    "vit_r50_b16": Client(
        "R50 + ViT-B/16",
        VIT,
        ".",
        vision("R50+ViT-B_16", "VisionTransformer"),
        f"{CAUGHT}; {AXIS}",
    ),
    "mixer_b16": Client(
        "Mixer-B/16", VIT, ".", vision("Mixer-B_16", "MlpMixer"), f"{CAUGHT}; {AXIS}"
    ),
}
