"""Devices: everything that is public, and each command's model, loss and step, on `meta`, where a tensor that was made
on another device is an error.
"""

from dataclasses import replace

import pytest
import torch

import functorch_mnist as fm
from functorch_mnist.commands import build
from functorch_mnist.options import RECIPES, Train

META = torch.device("meta")
ROWS, CLASSES = 4, 10


def on_meta(values):
    return fm.tree.map(lambda leaf: leaf.to(META), values)


IMAGES = torch.zeros(ROWS, 1, 28, 28, dtype=torch.uint8, device=META)
LABELS = torch.zeros(ROWS, dtype=torch.int64, device=META)
KEYS = torch.zeros(ROWS, 2, dtype=torch.int32, device=META)


def check(values):
    """All leaves are on the meta device."""
    leaves = fm.tree.leaves(values)
    assert leaves
    for leaf in leaves:
        assert leaf.device == META, leaf
    return values


RUNS = {
    **RECIPES,
    "mlp": Train(model="mlp"),
    "linear": Train(model="linear", loss="mse"),
    "small cnn": Train(model="small-cnn", focal_gamma=1.0),
    "deskewed": Train(deskew=True),
    "bfloat16": Train(precision="bfloat16"),
    "weighted": Train(class_weights="balanced", logit_adjustment=1.0),
    "weighted mse": Train(loss="mse", class_weights="1,1,1,1,1,1,1,1,1,2"),
    "smoothed": Train(label_smoothing=0.1),
    "augmented": Train(augment="shift=1,rotate=5,scale=0.1,shear=0.05,elastic=0.7,erase=0.2"),
    "mixed": Train(mixup=0.4),
    "copies": Train(augment_multiplicity=2),
    "adam": Train(optimizer="adam", schedule="cosine", max_norm=1.0),
    "averaged": Train(optimizer="adamw", swa_start=0.5, schedule="step-decay"),
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_each_commands_model_loss_and_step_stay_on_their_device(options):
    begun = build.Origin(options, (0.1307, 0.3081), ROWS, CLASSES, (1,) * CLASSES)
    made = build.classifier(begun)
    examples = fm.data.Split(IMAGES, LABELS)
    others = build.partners(options, examples)
    losses_fn = build.losses(made, options, others)
    optimizer = build.optimizer(options, 10)
    params = on_meta(made.init(fm.random.key(0)))
    prepared = check(build.prepared(made, IMAGES))
    check(made.outputs(params, IMAGES))
    state = fm.train.init_state(params, optimizer, KEYS[0])
    mask = torch.zeros(ROWS, dtype=torch.bool, device=META)
    divisor = torch.zeros((), device=META)
    for estimator in (fm.train.batch_gradient(losses_fn), fm.train.gradient_with_noise(losses_fn)):
        step = fm.train.make_step(estimator, optimizer)
        check(step(state, prepared, LABELS, KEYS, mask=mask, divisor=divisor))
    valuing = build.valuing(made, losses_fn, examples, META)
    state = fm.train.init_state(params, optimizer, KEYS[0], valuing)
    step = fm.train.make_step(valuing, optimizer)
    check(step(state, prepared, LABELS, KEYS, mask=mask, divisor=divisor))


@pytest.mark.parametrize(
    "options", [RECIPES["private"], replace(RECIPES["private"], model="cnn")], ids=["scattering", "cnn"]
)
@pytest.mark.parametrize("clipping", ["flat", "automatic", "global", "per-layer", "quantile"])
def test_private_steps_stay_on_their_device(options, clipping):
    options = replace(options, clipping=clipping)
    made = build.classifier(build.Origin(options, (0.1307, 0.3081), ROWS, CLASSES))
    rule, optimizer = build.clipping(options), build.optimizer(options, 10)
    step = fm.train.make_private_step(
        build.losses(made, options), optimizer, clipping=rule, mechanism=fm.privacy.Poisson(0.5, 1.0), examples=ROWS
    )
    params = on_meta(made.init(fm.random.key(0)))
    state = fm.train.init_private_state(params, optimizer, KEYS[0], rule)
    state = state._replace(estimator=on_meta(rule.init()))
    batch = fm.data.Batch(LABELS, torch.zeros(ROWS, dtype=torch.bool, device=META))
    roots = torch.cat([KEYS, KEYS])[:4]
    sums = fm.privacy.zero_sums(params, rule, META)
    sums = check(step._parts.add(state, sums, roots, batch, None, build.prepared(made, IMAGES), LABELS))
    check(step._parts.end(state, sums, roots))


MODEL = fm.models.cnn()
PARAMS = on_meta(MODEL.init(fm.random.key(0)))
BATCH = (IMAGES.float(), LABELS)
MASK = torch.zeros(ROWS, dtype=torch.bool, device=META)


def loss_fn(params, image, label):
    return fm.losses.cross_entropy(MODEL.apply(params, image), label)


def outputs(params, image):
    return MODEL.apply(params, image)


def norms_of(gradients):
    return fm.statistics.Norms.of(gradients), fm.statistics.Moments.of(gradients)


def factors_of(gradients):
    return fm.statistics.KroneckerFactors.of(gradients)


PUBLIC = {
    "clipped_sum": lambda: tuple(fm.per_sample.clipped_sum(loss_fn, PARAMS, *BATCH, max_norm=1.0, mask=MASK)),
    "norms": lambda: fm.per_sample.norms(loss_fn, PARAMS, *BATCH, mask=MASK),
    "chunks": lambda: fm.per_sample.norms(loss_fn, PARAMS, *BATCH, mask=MASK, chunk_size=3),
    "clipped groups": lambda: tuple(
        fm.per_sample.clipped_sum(loss_fn, PARAMS, *BATCH, max_norm=1.0, mask=MASK, group=LABELS)
    ),
    "moments of groups": lambda: fm.per_sample.second_moment(loss_fn, PARAMS, *BATCH, group=LABELS),
    "sums of groups": lambda: fm.privacy.clipped_sums(
        loss_fn, PARAMS, *BATCH, clipping=fm.privacy.Flat(1.0), mask=MASK, group=LABELS
    ),
    "gram": lambda: fm.per_sample.gram(loss_fn, PARAMS, BATCH, chunk_size=3),
    "dot": lambda: fm.per_sample.dot(loss_fn, PARAMS, *BATCH, direction=PARAMS),
    "grad_and_dot": lambda: tuple(fm.per_sample.grad_and_dot(loss_fn, PARAMS, *BATCH, direction=PARAMS, mask=MASK)),
    "valuing": lambda: fm.train.gradient_with_data_values(loss_fn, BATCH, validation_batch=2, ema_decay=0.9, order=2)(
        PARAMS, *BATCH, key=KEYS[0]
    ),
    "second_moment": lambda: fm.per_sample.second_moment(loss_fn, PARAMS, *BATCH),
    "kronecker": lambda: fm.per_sample.kronecker(loss_fn, PARAMS, *BATCH),
    "weighted_sum": lambda: fm.per_sample.weighted_sum(loss_fn, PARAMS, *BATCH, weights=torch.zeros(ROWS, device=META)),
    "fold": lambda: fm.statistics.fold(loss_fn, PARAMS, *BATCH, of=norms_of, chunk_size=3),
    "factors": lambda: fm.statistics.fold(loss_fn, PARAMS, *BATCH, of=factors_of),
    "cosines": lambda: fm.statistics.cosines(loss_fn, PARAMS, *BATCH, direction=PARAMS),
    "features": lambda: fm.attribution.features(
        loss_fn,
        PARAMS,
        *BATCH,
        projection=on_meta(fm.attribution.projection(MODEL.init(fm.random.key(0)), key=fm.random.key(1), size=8)),
    ),
    "tangent_kernel": lambda: fm.attribution.tangent_kernel(outputs, PARAMS, BATCH[:1]),
    "gradient_cosine": lambda: fm.attribution.gradient_cosine(loss_fn, PARAMS, BATCH, BATCH),
    "clipped_sums": lambda: fm.privacy.clipped_sums(loss_fn, PARAMS, *BATCH, clipping=fm.privacy.Flat(1.0)),
    "augmented": lambda: fm.data.augmented(IMAGES.float(), KEYS, fm.data.Augmentation(shift=1, elastic=0.5)),
    "scattering": lambda: fm.models.scattering(IMAGES[:, 0].float(), fm.models.scattering_filters(28, 28, device=META)),
    "deskewed": lambda: fm.data.deskewed(IMAGES.float()),
    "glyphs": lambda: fm.data.glyphs(KEYS[0], 3, 2),
    "discriminants": lambda: fm.models.discriminants(IMAGES.float().view(ROWS // 2, 2, -1), count=1, shrinkage=1.0),
    "shifted": lambda: fm.data.shifted(IMAGES.float(), KEYS, pixels=2),
    "mixup_weights": lambda: fm.data.mixup_weights(0.4)(KEYS),
    "balanced_order": lambda: fm.data.epoch_order(5, key=KEYS[0], epoch=1),
    "normal": lambda: fm.random.normal(KEYS[0], (3,)),
    "box_muller": lambda: fm.random.box_muller(KEYS[0], (3,)),
    "box_muller_sum": lambda: fm.random.box_muller_sum(KEYS[:1], torch.ones(1, device=META), (3,)),
    "noise_draws": lambda: fm.privacy.noise_draws(fm.privacy.bisr(3), KEYS[0], 5),
    "noise_draws_of_blocks": lambda: fm.privacy.noise_draws(fm.privacy.banded(3, 9), KEYS[0], 5),
    "uniform": lambda: fm.random.uniform(KEYS[0], (3,)),
    "randint": lambda: fm.random.randint(KEYS[0], (3,), 0, 5),
    "split": lambda: fm.random.split(KEYS[0], 3),
    "permutation": lambda: fm.random.permutation(KEYS[0], 5),
    "subsets": lambda: fm.attribution.subsets(5, key=KEYS[0], count=2, fraction=0.5),
    "draws": lambda: fm.train.epoch_draws(KEYS[0], 9, epoch=1, batch_size=4),
    "joins": lambda: fm.privacy.poisson_mask(KEYS[0], 3, 9, 0.5),
    "focal": lambda: fm.losses.focal(LOGITS, LABELS, gamma=2.0),
    "mse": lambda: fm.losses.mse(LOGITS, fm.losses.one_hot(LABELS, CLASSES)),
    "logit_adjusted": lambda: fm.losses.logit_adjusted(LOGITS, LOGITS[0], strength=1.0),
    "output_scores": lambda: fm.attribution.output_scores(LOGITS, LABELS),
    "log_odds": lambda: fm.attribution.log_odds(LOGITS, LABELS),
    "scores": lambda: fm.attribution.scores(outputs, PARAMS, BATCH[0], labels=LABELS, chunk_size=3),
    "predictions": lambda: fm.train.predictions(MODEL.apply, PARAMS, BATCH[0], batch_size=3),
    "ensemble": lambda: fm.ensemble.mean(LOGITS[None]),
    "vote": lambda: fm.ensemble.vote(LOGITS[None]),
    "disagreement": lambda: fm.ensemble.disagreement(LOGITS[None].expand(2, -1, -1)),
    "mutual_information": lambda: fm.ensemble.mutual_information(LOGITS[None].expand(2, -1, -1)),
    "brier": lambda: fm.calibration.brier(LOGITS.softmax(-1), LABELS),
    "linear": lambda: fm.models.mlp((784, 8, CLASSES)).apply(LINEAR, BATCH[0].flatten(1)),
    "dropout": lambda: fm.layers.dropout(LOGITS, KEYS, rate=0.5),
    "group_norm": lambda: fm.layers.group_norm(torch.zeros(ROWS, 8, 3, 3, device=META), 2),
}
LOGITS = torch.zeros(ROWS, CLASSES, device=META)
LINEAR = on_meta(fm.models.mlp((784, 8, CLASSES)).init(fm.random.key(0)))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_stay_on_their_device(name):
    check(PUBLIC[name]())
