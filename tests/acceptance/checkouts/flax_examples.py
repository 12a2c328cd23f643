"""The examples of the flax repository."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from flax.training import train_state

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

REPOSITORY = "google/flax"


def state_of(apply: Any, params: Any, kind: Any = train_state.TrainState, **more: Any):
    """A training state as the examples have it, at step 0."""
    return kind.create(apply_fn=apply, params=params, tx=optax.identity(), **more)


def initial(model: Any, *inputs: Any, **options: Any) -> dict[str, Any]:
    """Variables of a Linen model, as shapes; every stream has the same key."""

    def init(key: Any, *arrays: Any) -> Any:
        return model.init({"params": key, "dropout": key}, *arrays, **options)

    return dict(jax.eval_shape(init, KEY, *inputs))


def settings_of(config: Any, kind: Any) -> dict[str, Any]:
    """The entries of an example's configuration that a dataclass has too."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: config[name] for name in config if name in names}


def mnist(folder: Path) -> Case:
    """Convolutional network in NNX, with batch norm and dropout."""
    del folder
    train = load("train")
    model = nnx.eval_shape(lambda: train.CNN(rngs=nnx.Rngs(0)))
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: Any, rest: Any, batch: Any) -> Any:
        model = nnx.merge(graph, params, rest)
        return train.loss_fn(model, batch, nnx.Rngs(0))

    batch = {"image": array(64, 28, 28, 1), "label": integers(64)}
    return Case(loss, params, (rest, batch), 64, has_aux=True)


def vae(folder: Path) -> Case:
    """Variational autoencoder."""
    del folder
    train = load("train")
    config = load("configs.default").get_config()
    model = load("models").model(config.latents)

    def step(params: Any, batch: Any, key: Any) -> Any:
        state = state_of(model.apply, params)
        return train.train_step(state, batch, key, config.latents)

    batch = array(config.batch_size, 784)
    params = jax.eval_shape(model.init, KEY, batch, KEY)["params"]
    return Case(loss_of(step), params, (batch, KEY), config.batch_size)


def seq2seq(folder: Path) -> Case:
    """LSTM encoder and decoder that add numbers."""
    del folder
    train = load("train")
    table = load("input_pipeline").CharacterTable("0123456789+= ")
    model, size = train.get_model(table), train.FLAGS.batch_size

    def step(params: Any, batch: Any, key: Any) -> Any:
        state = state_of(model.apply, params)
        return train.train_step.__wrapped__(state, batch, key, table.eos_id)

    params = jax.eval_shape(lambda k: train.get_initial_params(model, k, table), KEY)
    letters = table.vocab_size
    batch = {
        "query": array(size, table.max_input_len, letters),
        "answer": array(size, table.max_output_len, letters),
    }
    terms = size * (table.max_output_len - 1)
    return Case(loss_of(step), params, (batch, KEY), terms, has_aux=True)


def transformer(name: str, batch_size: int) -> Case:
    """The transformers of the examples lm1b and wmt."""
    train, models = load("train"), load("models")
    values = load("configs.default").get_config()
    config = models.TransformerConfig(
        **settings_of(values, models.TransformerConfig)
        | {"output_vocab_size": values.vocab_size, "dtype": "bfloat16"}
    )
    model = getattr(models, name)(config)
    wmt = name == "Transformer"
    kind = train.TrainState if wmt else train_state.TrainState
    more = {"dynamic_scale": None} if wmt else {}

    def step(params: Any, batch: Any, key: Any) -> Any:
        state = state_of(model.apply, params, kind, **more)
        rate = values.learning_rate
        smoothing = values.label_smoothing
        return train.train_step(state, batch, config, lambda _: rate, smoothing, key)

    tokens = integers(batch_size, values.max_target_length)
    inputs = (tokens, tokens) if wmt else (tokens,)
    params = initial(model, *inputs)["params"]
    batch = dict(zip(("inputs", "targets"), inputs, strict=False))
    terms = tokens.size
    return Case(loss_of(step), params, (batch, KEY), terms, has_aux=True)


def lm1b(folder: Path) -> Case:
    """Language model in bfloat16."""
    del folder
    return transformer("TransformerLM", 32)


def wmt(folder: Path) -> Case:
    """Translation in bfloat16, with shared embeddings."""
    del folder
    return transformer("Transformer", 32)


def nlp_seq(folder: Path) -> Case:
    """Part-of-speech tagging."""
    del folder
    train, models = load("train"), load("models")
    config = models.TransformerConfig(
        vocab_size=20_000, output_vocab_size=50, max_len=256
    )
    model = models.Transformer(config)

    def step(params: Any, batch: Any, key: Any) -> Any:
        state = state_of(model.apply, params)
        return train.train_step(state, batch, model, lambda _: 0.0, key)

    tokens = integers(64, 256)
    params = jax.eval_shape(
        lambda key, tokens: model.init(key, inputs=tokens, train=False), KEY, tokens
    )["params"]
    batch = {"inputs": tokens, "targets": tokens}
    return Case(loss_of(step), params, (batch, KEY), tokens.size, has_aux=True)


def sst2(folder: Path) -> Case:
    """Sentiment of sentences, by a bidirectional LSTM with attention."""
    del folder
    train = load("train")
    config = load("configs.default").get_config()
    config.vocab_size = 12_000
    model, size = train.model_from_config(config), config.batch_size

    def step(params: Any, batch: Any, key: Any) -> Any:
        return train.train_step(state_of(model.apply, params), batch, {"dropout": key})

    params = jax.eval_shape(lambda key: train.get_initial_params(key, model), KEY)
    batch = {
        "token_ids": integers(size, config.max_input_length),
        "length": integers(size),
        "label": array(size),
    }
    return Case(loss_of(step), params, (batch, KEY), size, has_aux=True)


def imagenet(folder: Path) -> Case:
    """ResNet-50 with an L2 penalty in the loss."""
    del folder
    train = load("train")
    model = load("models").ResNet50(num_classes=1000, dtype="float32")
    variables = initial(model, array(1, 224, 224, 3), train=False)

    def step(params: Any, averages: Any, batch: Any) -> Any:
        more = {"batch_stats": averages, "dynamic_scale": None}
        state = state_of(model.apply, params, train.TrainState, **more)
        return train.train_step(state, batch, lambda _: 0.1)

    batch = {"image": array(64, 224, 224, 3), "label": integers(64)}
    args = variables["batch_stats"], batch
    loss = on_one_device(loss_of(step), "batch")
    return Case(loss, variables["params"], args, 64, has_aux=True)


def ppo(folder: Path) -> Case:
    """Actor and critic of proximal policy optimisation."""
    del folder
    library, model = load("ppo_lib"), load("models").ActorCritic(num_outputs=4)
    config = load("configs.default").get_config()

    def loss(params: Any, minibatch: Any) -> Any:
        weights = config.clip_param, config.vf_coeff, config.entropy_coeff
        return library.loss_fn(params, model.apply, minibatch, *weights)

    size = config.batch_size
    states = array(size, 84, 84, 4)
    rest = array(size), array(size), array(size)
    params = initial(model, states)["params"]
    return Case(loss, params, ((states, integers(size), *rest),), size)


def gemma(folder: Path) -> Case:
    """Gemma 3 with 1B parameters, in NNX."""
    del folder
    train, library = load("train"), load("transformer")
    config = library.TransformerConfig.from_version_name("gemma3_1b")
    model = nnx.eval_shape(lambda: library.Transformer(config, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params: Any, rest: Any, batch: Any) -> Any:
        model = nnx.merge(graph, params, rest)
        return train.jax_train_step(model, None, nnx.Rngs(0), batch, None)

    tokens = integers(4, 512)
    names = "inputs", "inputs_position", "inputs_segmentation", "targets"
    batch = dict.fromkeys(names, tokens)
    return Case(loss_of(step), params, (rest, batch), tokens.size, has_aux=True)


EXAMPLES = {
    "mnist": (mnist, "parameters split off with nnx; nnx.Rngs made in the loss"),
    "vae": (vae, CAUGHT),
    "seq2seq": (seq2seq, CAUGHT),
    "lm1b": (lm1b, CAUGHT),
    "wmt": (wmt, CAUGHT),
    "nlp_seq": (nlp_seq, f"{CAUGHT}; 20,000 words and 50 tags"),
    "sst2": (sst2, f"{CAUGHT}; 12,000 words"),
    "imagenet": (imagenet, f"{CAUGHT}; dynamic_scale off; {AXIS}"),
    "gemma": (gemma, f"{CAUGHT}; parameters split off with nnx"),
    "ppo": (ppo, "apply_fn and coefficients closed over"),
}
CLIENTS = {
    f"flax_{name}": Client(
        f"flax {name}", REPOSITORY, f"examples/{name}", make, adapted
    )
    for name, (make, adapted) in EXAMPLES.items()
}
