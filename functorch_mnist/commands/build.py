"""From options to the pure functions that a command runs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import data, layers, models, optim, per_sample, privacy, random, train, tree
from .. import losses as losses_of
from .. import options as options_of
from ..models import Model, Params
from ..options import Train, given_weights
from ..per_sample import measured
from .faults import refusing, saying_warnings
from .sources import Parts
from .waiting import slowly

SIDE, PART = 28, 1000
"""Pixels of a side, and images that are prepared at once."""
FEATURES, CLASSES, HANDS, SHRINKAGE = 512, 1024, 8, 3.0
"""Discriminants of scattering features: how many, from how many classes of random glyphs in how many hands each; their
shrinkage."""
NORM_GROUPS = 27
"""In which the 81 channels of scattering features are normalised first: by the image alone."""
PUBLIC_PIXELS = (0.1307, 0.3081)
"""Mean and standard deviation of pixels that are customary for MNIST, whatever the data set."""


EFFECTIVE = 0.999
"""β of effective numbers of images."""
VALUE_DRAW, VALUE_SMOOTHING, VALUE_RENEWED = 32, 0.85, 16
"""Held-out images that are drawn to value training images, the decay of the moving average of their gradients, and the
steps from one draw to the next where all steps are watched."""


class Classifier(NamedTuple):
    """What a run trains, as pure functions of images as they are stored."""

    init: Callable[[Tensor], Params]
    """`init(key) -> params`."""
    outputs: Callable[..., Tensor]
    """`outputs(params, images (..., 1, 28, 28) uint8, key=None) -> (..., classes)`, whose softmax is the answer.

    It takes what `inputs` makes of images as well; such pixels, from 0 to 255, may have been changed."""
    inputs: Callable[[Tensor], Tensor]
    """What does not change in training, computed once: images to what `outputs` would make of them first. Pixels stay
    from 0 to 255."""
    prepares: str
    """What `inputs` does, in words; empty where it does nothing."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """`loss(outputs (..., classes), labels (...)) -> (...)`: what training makes small."""
    test_loss: Callable[[Tensor, Tensor], Tensor]
    """The same without what is for training alone: weights, adjustment, focus and smoothing."""


class Origin(NamedTuple):
    """What a run began with and keeps: the config of its checkpoints."""

    options: Train
    normalization: tuple[float, float]
    """Mean and standard deviation of the training images' pixels, scaled to [0, 1]."""
    examples: int
    """How many training images there are."""
    classes: int
    counts: tuple[int, ...] = ()
    """How many training images of each class there are, where the loss depends on them."""


class Best(NamedTuple):
    """A run's best epoch on the held-out images."""

    params: Params
    correct: Tensor
    """0-d int64: how many of them were right, -1 before the first epoch."""
    epoch: Tensor
    """0-d int64: from 0, -1 before the first."""


class Values(NamedTuple):
    """What the training images of a run have been worth so far."""

    total: Tensor
    """(N,) float64: the sum of the values of each, in units of the held-out loss."""
    times: Tensor
    """(N,) int64: in how many watched steps each was."""


class Saved(NamedTuple):
    """What a checkpoint of a run holds."""

    state: train.State
    loss: Tensor
    """The `Progress.loss` that goes with the state."""
    best: Best | tuple[()] = ()
    """Where the best epoch is kept."""
    values: Values | tuple[()] = ()
    """Where they are watched."""


class Partners(NamedTuple):
    """What mixup mixes an image with."""

    examples: data.Split
    """All training images: each partner is one of them."""
    weights: Callable[[Tensor], Tensor]
    """From keys to the weights of the images themselves."""


def with_values(options: Train, values: Mapping[str, Any]) -> Train:
    """The options with others for some; a hyperparameter may be a 0-d tensor, which the pure functions take as well."""
    return replace(options, **values)


def origin(options: Train, dataset: Parts) -> Origin:
    """The origin of a new run; a private one takes fixed statistics of pixels, because the images' own depend on them.

    Raises:
        UsageError: the training images are blank.
    """
    images = dataset.train.images
    with refusing(ValueError):
        normalization = PUBLIC_PIXELS if options.private else data.normalization(images)
    counts = torch.bincount(dataset.train.labels, minlength=dataset.classes).tolist()
    counted = options.logit_adjustment or options.class_weights in ("balanced", "effective")
    return Origin(options, normalization, len(images), dataset.classes, tuple(counts) if counted else ())


def classifier(begun: Origin) -> Classifier:
    """The run's model and loss."""
    options, (mean, std), _, classes, _ = begun
    model = _model(options, classes)
    apply = train.in_precision(model.apply, getattr(torch, options.precision))
    scaled = _same if options.model == "scattering" else partial(data.normalize, mean=mean, deviation=std)
    fixed = _fixed(options)

    def outputs(params: Params, images: Tensor, key: Tensor | None = None) -> Tensor:
        outputs: Tensor = apply(params, scaled(images if images.is_floating_point() else fixed(images)), key=key)
        return outputs

    def test_loss(outputs: Tensor, labels: Tensor) -> Tensor:
        if options.loss == "mse":
            return _squared(outputs, labels)
        return losses_of.cross_entropy(outputs, labels)

    prepares = "Computing scattering features" if options.model == "scattering" else "Deskewing" * options.deskew
    return Classifier(model.init, outputs, fixed, prepares, _training_loss(begun), test_loss)


def _fixed(options: Train) -> Callable[[Tensor], Tensor]:
    """What does not change in training, of images (..., 1, 28, 28) as they are stored."""
    if options.model == "scattering":
        discriminants = _discriminants()

        def features(images: Tensor) -> Tensor:
            own = tree.map(lambda constant: constant.to(images.device), discriminants)
            return models.discriminated(_scattering(images[..., 0, :, :].float() / 255), own)

        return features
    return partial(seen, options)


def seen(options: Train, images: Tensor) -> Tensor:
    """Images (..., 1, 28, 28) as a run's network sees them, as pixels: deskewed, where the run deskews."""
    return data.deskewed(images.float()) if options.deskew or options.model == "scattering" else images


def _scattering(images: Tensor) -> Tensor:
    """Scattering features of images (..., 28, 28) in [0, 1], deskewed; normalised."""
    filters = tree.map(lambda spectrum: spectrum.to(images.device), _filters())
    return layers.group_norm(models.scattering(data.deskewed(images), filters), NORM_GROUPS).flatten(-3)


@cache
def _filters() -> models.Filters:
    """Of two scales and eight angles."""
    return models.scattering_filters(SIDE, SIDE, scale=2, angles=8)


@cache
def _discriminants() -> models.Discriminants:
    """Discriminants of random glyphs: of no data, and the same in each run."""
    glyphs = data.glyphs(random.key(0), CLASSES, HANDS, size=SIDE)
    return models.discriminants(_scattering(glyphs), count=FEATURES, shrinkage=SHRINKAGE)


def _same(images: Tensor) -> Tensor:
    return images


def _training_loss(begun: Origin) -> Callable[[Tensor, Tensor], Tensor]:
    """What training makes small, of outputs and labels."""
    options, classes, weights = begun.options, begun.classes, _class_weights(begun)
    if options.loss == "mse":

        def squared(outputs: Tensor, labels: Tensor) -> Tensor:
            errors = _squared(outputs, labels)
            return errors if weights is None else errors * _looked_up(weights, labels)

        return squared
    counts = torch.tensor(begun.counts or [1] * classes, dtype=torch.float32)
    log_priors = (counts.clamp(min=0.5) / counts.sum()).log()  # finite for a class without images

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        if options.logit_adjustment:
            priors = log_priors.to(outputs.device)
            outputs = losses_of.logit_adjusted(outputs, priors, strength=options.logit_adjustment)
        of_class = None if weights is None else weights.to(outputs.device)
        if options.focal_gamma:
            return losses_of.focal(outputs, labels, gamma=options.focal_gamma, class_weights=of_class)
        return losses_of.cross_entropy(outputs, labels, class_weights=of_class, label_smoothing=options.label_smoothing)

    return loss


def _squared(outputs: Tensor, labels: Tensor) -> Tensor:
    """The squared error of the probabilities."""
    return losses_of.mse(outputs.softmax(-1), losses_of.one_hot(labels, outputs.shape[-1]))


def _class_weights(begun: Origin) -> Tensor | None:
    """What the loss of each class is multiplied by: (K,), or none for ones."""
    options = begun.options
    if options.class_weights is None:
        return None
    given = given_weights(options)
    if given is not None:
        return torch.tensor(given)
    counts = torch.tensor(begun.counts)
    if options.class_weights == "balanced":
        return losses_of.balanced_weights(counts)
    return losses_of.effective_number_weights(counts, beta=EFFECTIVE)


def _looked_up(weights: Tensor, labels: Tensor) -> Tensor:
    """`weights[labels]`, also under `vmap`."""
    return weights.to(labels.device).index_select(0, labels.reshape(-1)).view(labels.shape)


def _model(options: Train, classes: int) -> Model:
    activation = layers.ACTIVATIONS[options.activation]
    if options.model == "cnn":
        return models.cnn(activation=activation, dropout=options.dropout)
    if options.model == "small-cnn":
        return models.small_cnn(activation=activation)
    if options.model == "scattering":
        return models.linear(FEATURES, classes, bias=False)
    hidden = options.hidden if options.model == "mlp" else ()
    flat = models.mlp((SIDE * SIDE, *hidden, classes), activation=activation)
    return Model(flat.init, lambda params, x, key=None: flat.apply(params, x.flatten(-3), key=key))


def schedule(options: Train, steps_per_epoch: int) -> optim.Schedule:
    """The run's learning rate over all epochs, as a function of the step.

    Raises:
        UsageError: numbers that do not go together.
    """
    steps = max(1, options.epochs * steps_per_epoch)
    schedules: dict[str, Callable[[], optim.Schedule]] = {
        "constant": lambda: optim.constant(options.lr),
        "cosine": lambda: optim.cosine(options.lr, steps=steps),
        "one-cycle": lambda: optim.one_cycle(options.lr, steps=steps, warmup=options.warmup),
        "step-decay": lambda: optim.step_decay(options.lr, every=steps_per_epoch),
    }
    with refusing(ValueError):
        return schedules[options.schedule]()


def optimizer(options: Train, steps_per_epoch: int) -> optim.Optimizer:
    """The run's optimizer, with its schedule over all epochs.

    Raises:
        UsageError: numbers that do not go together.
    """
    lr = options.lr if options.schedule == "constant" else schedule(options, steps_per_epoch)
    decay = options.weight_decay
    with refusing(ValueError):
        if options.optimizer == "sgd":
            chosen = optim.sgd(
                lr,
                momentum=options.momentum,
                dampening=options.dampening,
                weight_decay=decay,
                nesterov=options.nesterov,
            )
        else:
            made = optim.adam if options.optimizer == "adam" else optim.adamw
            chosen = made(lr, b1=options.momentum, b2=options.beta2, weight_decay=decay)
    if options.max_norm is not None:
        chosen = optim.clip_by_global_norm(chosen, max_norm=options.max_norm)
    if options.ema_decay:
        return optim.exponential_moving_average(chosen, decay=options.ema_decay)
    if options.swa_start is not None:
        first = max(1, math.ceil(options.swa_start * options.epochs)) * steps_per_epoch
        return optim.stochastic_weight_averaging(chosen, start=first, every=steps_per_epoch)
    return chosen


def averages(options: Train) -> bool:
    """Whether an average of the parameters is kept."""
    return bool(options.ema_decay) or options.swa_start is not None


def current(options: Train, state: train.State) -> Params:
    """The parameters that a state stands for: their average, where one is kept."""
    params: Params = state.optimizer.average if averages(options) else state.params
    return params


def tested(options: Train, saved: Saved) -> Params:
    """The parameters that are tested: the best epoch's, where it is kept."""
    return saved.best.params if isinstance(saved.best, Best) else current(options, saved.state)


def prepared(made: Classifier, images: Tensor) -> Tensor:
    """What the training images become before it starts, some at a time; says so, where that takes long."""
    parts = images.split(PART)
    if len(parts) > 1 and made.prepares:
        return torch.cat([made.inputs(part) for part in slowly(parts, made.prepares, unit="images", of=PART)])
    return torch.cat([made.inputs(part) for part in parts])


def partners(options: Train, examples: data.Split) -> Partners | None:
    """What mixup draws from, if there is any."""
    return Partners(examples, data.mixup_weights(options.mixup)) if options.mixup else None


def losses(made: Classifier, options: Train, others: Partners | None = None) -> Callable[..., Tensor]:
    """`losses(params, images (..., 1, 28, 28), labels (...), keys (..., 2)) -> (...)`: what training makes small.

    Args:
        made: the model and its loss.
        options: of the run.
        others: what images are mixed with, if they are.
    """
    augmentation = data.Augmentation(**options_of.augmentation(options))

    def changed(images: Tensor, keys: Tensor) -> Tensor:
        return data.augmented(images.float(), keys, augmentation)

    def mixed(others: Partners, params: Params, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        partner_key, weight_key, change_key, keys = random.split(keys, 4).unbind(-2)
        which = random.randint(partner_key, (), 0, len(others.examples.labels))
        second = others.examples.images.index_select(0, which.reshape(-1)).view(images.shape)
        weight = others.weights(weight_key)
        pixels = torch.lerp(second.float(), images.float(), weight[..., None, None, None])
        outputs = made.outputs(params, changed(pixels, change_key), keys)
        return weight * made.loss(outputs, labels) + (1 - weight) * made.loss(
            outputs, _looked_up(others.examples.labels, which)
        )

    def losses_fn(params: Params, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        if others is not None:
            return mixed(others, params, images, labels, keys)
        if options.augment is not None:
            change_key, keys = random.split(keys).unbind(-2)
            return made.loss(made.outputs(params, changed(images, change_key), keys), labels)
        if not options.augment_multiplicity:
            return made.loss(made.outputs(params, images, keys), labels)
        shift_keys, keys = random.split(random.split(keys, options.augment_multiplicity)).unbind(-2)  # (..., copies, 2)
        copies = images.unsqueeze(-4).expand(*keys.shape[:-1], *images.shape[-3:])
        outputs = made.outputs(params, data.shifted(copies, shift_keys, pixels=options.max_shift), keys)
        return made.loss(outputs, labels.unsqueeze(-1).expand(keys.shape[:-1])).mean(-1)

    return losses_fn


def fastest(
    loss_fn: Callable[..., Tensor], params: Params, *example: Tensor, options: Train, batch_size: int
) -> Callable[..., Tensor]:
    """The loss of one example, whose sample gradients are taken as `plan --tune` has found fastest, where it has."""
    if not measured.default_file().exists():
        return loss_fn
    batch = [x.expand(batch_size, *x.shape) for x in example]
    with saying_warnings():
        plan = per_sample.tune(loss_fn, params, *batch, compile=options.compile == "on", measure=False)
    return plan.of(loss_fn)


def order(options: Train, labels: Tensor) -> train.Order | None:
    """Which images an epoch sees; none for each once."""
    if options.sampler == "shuffled":
        return None
    return lambda key, epoch: data.balanced_order(labels, key=key, epoch=epoch)


def clipping(options: Train) -> privacy.Clipping:
    """The run's clipping rule."""
    norm = options.clip_norm
    rules: dict[str, Callable[[], privacy.Clipping]] = {
        "flat": lambda: privacy.Flat(norm),
        "automatic": lambda: privacy.Automatic(norm),
        "global": lambda: privacy.Global(norm),
        "per-layer": lambda: privacy.PerLayer(norm),
        "quantile": lambda: privacy.Quantile(0.5, count_stddev=options.batch_size / 20, initial_norm=norm),
    }
    return rules[options.clipping]()


def values_watched(options: Train) -> bool:
    """Whether a run finds the values of its training images."""
    return "value" in options_of.watched(options)


def valuing(
    made: Classifier,
    loss_fn: Callable[..., Tensor],
    held_out: data.Split | None,
    where: torch.device,
    *,
    renew: bool = True,
) -> train.Estimator:
    """The estimator of the values of training images: the loss of held-out images is the one they are tested by.

    Args:
        made: the run's model and loss.
        loss_fn: of one training image.
        held_out: what they are valued by; none for an estimator that gives its first state alone.
        where: the device.
        renew: whether held-out images are drawn.
    """
    blank = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.uint8, device=where)
    images, labels = (blank, blank[:, 0, 0, 0].long()) if held_out is None else held_out

    def held_out_loss(params: Params, image: Tensor, label: Tensor) -> Tensor:
        return made.test_loss(made.outputs(params, image), label)

    return train.gradient_with_data_values(
        loss_fn,
        (prepared(made, images), labels),
        validation_loss=held_out_loss,
        validation_batch=VALUE_DRAW,
        ema_decay=VALUE_SMOOTHING,
        refresh=renew,
    )


def start(
    options: Train, made: Classifier, chosen: optim.Optimizer, where: torch.device, *, examples: int = 0
) -> Saved:
    """The state before the first step, drawn from the seed; also the template of the run's checkpoints.

    Args:
        options: of the run.
        made: gives the initial parameters.
        chosen: the optimizer.
        where: the device.
        examples: how many training images there are, whose values are kept where they are watched.

    Raises:
        UsageError: there is no memory for it.
    """
    init_key, train_key = random.split(random.key(options.seed, device=where)).unbind(0)
    with refusing(RuntimeError, "The model must fit in memory. Found: "):
        state = train.init_state(made.init(init_key), chosen, train_key)
    if options.private:
        state = state._replace(estimator=clipping(options).init())
    values: Values | tuple[()] = ()
    if values_watched(options):
        valued = valuing(made, losses(made, options), None, where).shared
        state = state._replace(estimator=() if valued is None else valued.init(state.params))
        total = torch.zeros(examples, dtype=torch.float64, device=where)
        values = Values(total, torch.zeros_like(total, dtype=torch.int64))
    best: Best | tuple[()] = ()
    if options.patience is not None:
        nothing = torch.full((), -1, dtype=torch.int64, device=where)
        best = Best({name: p.clone() for name, p in current(options, state).items()}, nothing, nothing.clone())
    return Saved(state, torch.zeros((), dtype=torch.float64, device=where), best, values)
