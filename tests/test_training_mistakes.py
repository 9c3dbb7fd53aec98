"""What a slip of the hand is answered with: the function, the rule, what was found, and the likely remedy."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from functorch_mnist import (
    attribution,
    ensemble,
    losses,
    models,
    optim,
    per_sample,
    privacy,
    random,
    statistics,
    sweep,
    train,
)

KEY = random.key(0)
PARAMS = {"w": torch.ones(2, 4), "b": torch.zeros(2)}
X, Y = torch.arange(32.0).view(8, 4) / 32, torch.arange(8) % 2
MODULE = nn.Linear(4, 2)
SGD, ADAM = optim.sgd(0.1, momentum=0.9), optim.adam(0.1)
TORCH_SGD = torch.optim.SGD(MODULE.parameters(), 0.1)
FLAT, POISSON, SECRET = privacy.Flat(1.0), privacy.Poisson(0.5, 1.0), privacy.Secret(1)


def outputs(params, x):
    return F.linear(x, params["w"], params["b"])


def loss(params, x, y):
    return losses.cross_entropy(outputs(params, x), y)


def loss_with_key(params, x, y, key):
    return loss(params, x, y)


STEP, KEYED = train.make_step(loss, SGD), train.make_step(loss_with_key, SGD)
STATE = train.init_state(PARAMS, SGD, KEY)
SUMS = privacy.clipped_sums(loss, PARAMS, X, Y, clipping=FLAT)


def fit(step=KEYED, state=STATE, examples=(X, Y), **more):
    return train.fit(step, state, examples, **{"epochs": 1, "batch_size": 4, **more})


def private(loss_fn=loss_with_key, optimizer=SGD, clipping=FLAT, mechanism=POISSON, examples=8, **more):
    return train.make_private_step(
        loss_fn, optimizer, clipping=clipping, mechanism=mechanism, examples=examples, **more
    )


PRIVATE, PRIVATE_STATE = private(), train.init_private_state(PARAMS, SGD, KEY, FLAT)


def fit_private(step=PRIVATE, state=PRIVATE_STATE, examples=(X, Y), secret=SECRET, steps=1, **more):
    return train.fit_private(step, state, examples, secret=secret, steps=steps, **more)


def fold(of, params=PARAMS):
    return statistics.fold(loss, params, X, Y, of=of)


def hypergradient(inputs):
    one = torch.tensor(1.0)
    return sweep.hypergradient(lambda h, w, x: w - h * x, lambda h, w: w * w, one, one, inputs, steps=1)


ONE_HOT, ARGMAX = torch.eye(2)[Y], r"One-hot\? Pass y\.argmax\(-1\)"
ENTRY = privacy.Entry(POISSON, repr(FLAT), data="letters", steps=1)
RELEASE = privacy.pipeline(FLAT, noise_multiplier=1.0, expected=8.0)


def audit(release=RELEASE, key=KEY):
    return privacy.audit(release, noise_multiplier=1.0, max_norm=1.0, trials=40, key=key)


def canaries(count):
    return train.plant_canaries(
        loss_with_key, PARAMS, SGD, (X, Y), clipping=FLAT, mechanism=POISSON, canaries=count, key=KEY
    )


def canary_state(count):
    planted = canaries(count)
    return train.init_private_state(planted.params, planted.optimizer, KEY, FLAT)


WITHOUT_KEY = r"called with \(params, .*Found loss\(params, x, y\)\. .*append a key \(2,\) of each example"
A_MODULE = r"params must be a pytree of float tensors\. Found the module Linear\. .*from_module"
TUPLE = r"must be a tuple of tensors\. Found one tensor\. Pass \(x,\)\?"
RULE = r"clipping must be a rule\. Found {}\. Pass privacy\.Flat\(max_norm\)\?"
SAMPLED = r"mechanism must say how examples are sampled, too\. Found {}\. Pass privacy\.Poisson"


def calls_the_module(params, x, y):
    return losses.cross_entropy(MODULE(x), y)


def estimated(out):
    """A step of an estimator that returns this."""
    return train.make_step(train.Estimator(lambda params, *batch, mask: out), SGD)(STATE, X, Y)


INDEPENDENT = r"must depend on its params\. Found that it uses none of them\. .*module\(x\)\? Use model\.apply"

MISTAKES = [
    # a loss of other parameters than those it gets: all gradients would be zero
    ("the loss of a step calls the module", lambda: train.make_step(calls_the_module, SGD)(STATE, X, Y), ValueError,
     "gradient: the loss " + INDEPENDENT),
    ("the losses of a batch call the module",
     lambda: train.batch_gradient(lambda params, x, y: losses.cross_entropy(MODULE(x), y))(PARAMS, X, Y), ValueError,
     "gradient: the loss " + INDEPENDENT),
    ("the loss of per-sample gradients calls the module", lambda: per_sample.norms(calls_the_module, PARAMS, X, Y),
     ValueError, "per_sample: the loss " + INDEPENDENT),
    ("the loss of a private step calls the module",
     lambda: fit_private(step=private(lambda params, x, y, key: calls_the_module(params, x, y))),
     ValueError, "per_sample: the loss " + INDEPENDENT),
    # what an estimator returns
    ("the function of an estimator is no estimator yet",
     lambda: train.make_step(lambda params, *batch, mask: (PARAMS, {"loss": X.sum()}), SGD)(STATE, X, Y), TypeError,
     r"gradient: loss_fn must return losses\. Found one that takes a mask\. Is it a train\.Estimator\(fn\)\?"),
    ("a state is loaded into a module", lambda: models.load_into(MODULE, STATE), TypeError,
     r"load_into: params must be a dict .*Found State\. Pass state\.params"),
    ("an estimator returns gradients alone", lambda: estimated(PARAMS), TypeError,
     r"Estimator: .*Found dict\. Return result\.grads"),
    ("an estimator returns no loss", lambda: estimated((PARAMS, {"norms": X})), TypeError,
     r"Estimator: .*Found \['norms'\]\. Add the 0-d sum"),
    ("an estimator returns a number", lambda: estimated((PARAMS, {"loss": X.sum(), "median": 1.0})), TypeError,
     r"Estimator: .*Found 'median': float\. Keep it a tensor"),
    ("an estimator returns the mask of a batch without padding",
     lambda: estimated((PARAMS, {"loss": X.sum(), "real": None})), TypeError,
     r"Estimator: .*Found 'real': NoneType\. The mask is None where"),
    # a state and what it belongs to
    ("a step is given parameters", lambda: STEP(PARAMS, X, Y), TypeError, r"step: .*State\. Found dict.*init_state"),
    ("a step is given a module", lambda: STEP(MODULE, X, Y), TypeError, r"step: .*State\. Found Linear"),
    ("fit is given parameters", lambda: fit(state=PARAMS), TypeError, r"fit: .*State\. Found dict.*init_state"),
    ("a private step is given parameters", lambda: PRIVATE(PARAMS, SECRET.roots(), X, Y), TypeError,
     r"private step: .*State\. Found dict.*init_private_state"),
    ("fit_private is given parameters", lambda: fit_private(state=PARAMS), TypeError, r"fit_private: .*Found dict"),
    ("the state of SGD meets Adam", lambda: train.make_step(loss, ADAM)(STATE, X, Y), TypeError,
     r"adam: the state must be the AdamState that init gives\. Found SGDState\. .*another optimizer"),
    ("the state of SGD without momentum meets momentum",
     lambda: STEP(train.init_state(PARAMS, optim.sgd(0.1), KEY), X, Y), ValueError, r"sgd: .*Found velocity: 0"),
    ("a plain state meets a moving average",
     lambda: train.make_step(loss, optim.exponential_moving_average(SGD, decay=0.9))(STATE, X, Y), TypeError,
     r"exponential_moving_average: .*Averaged that init gives\. Found SGDState"),
    ("a plain state meets an estimator that keeps something",
     lambda: train.make_step(train.gradient_with_data_values(loss, (X, Y), ema_decay=0.5), SGD)(STATE, X, Y),
     ValueError, r"gradient_with_data_values: the state must keep.*Found 0 .*init_state\(.*, estimator\)"),
    ("a plain state meets an adaptive rule",
     lambda: private(clipping=privacy.Quantile(0.5, 2.0))(STATE, SECRET.roots(), X, Y), ValueError,
     r"private step: the state must hold what Quantile adapts\. Found 0 tensors\. .*init_private_state"),
    # parameters, keys and optimizers
    ("init_state is given a module", lambda: train.init_state(MODULE, SGD, KEY), TypeError, "init_state: " + A_MODULE),
    ("init_state is given a generator", lambda: train.init_state(MODULE.parameters(), SGD, KEY), TypeError,
     r"init_state: .*Found a generator\. Pass dict\(module\.named_parameters\(\)\)"),
    ("init_state is given a seed", lambda: train.init_state(PARAMS, SGD, 0), TypeError,
     r"init_state: key must be an int32 tensor \(2,\)\. Found 0\. Make one with random\.key"),
    ("init_state is given keys", lambda: train.init_state(PARAMS, SGD, random.split(KEY)), ValueError,
     r"init_state: key must be \(2,\)\. Found \(2, 2\)"),
    ("init_state is given torch's optimizer", lambda: train.init_state(PARAMS, TORCH_SGD, KEY), TypeError,
     r"init_state: optimizer must be an optim\.Optimizer\. Found SGD\. .*optim\.sgd"),
    ("make_step is given torch's optimizer", lambda: train.make_step(loss, TORCH_SGD), TypeError,
     r"make_step: optimizer must be"),
    ("make_step is given the optimizer first", lambda: train.make_step(SGD, loss), TypeError,
     r"make_step: optimizer must be an optim\.Optimizer\. Found function"),
    ("a private step is given torch's optimizer", lambda: private(optimizer=TORCH_SGD), TypeError,
     r"private step: optimizer must be"),
    ("evaluate is given a module's params", lambda: train.evaluate(outputs, losses.cross_entropy, MODULE, X, Y),
     TypeError, "evaluate: " + A_MODULE),
    ("evaluate is given a module as the forward", lambda: train.evaluate(MODULE, losses.cross_entropy, PARAMS, X, Y),
     TypeError, r"evaluate: apply_fn must be a function.*Found the module Linear.*from_module"),
    ("evaluate is given a state", lambda: train.evaluate(outputs, losses.cross_entropy, STATE, X, Y), TypeError,
     r"evaluate: params must be .*Found State\. Pass its params\?"),
    ("fold is given a module", lambda: fold(statistics.Norms.of, MODULE), TypeError, "fold: " + A_MODULE),
    ("noise_scale is given a module", lambda: statistics.noise_scale(loss, MODULE, X, Y), TypeError,
     "noise_scale: " + A_MODULE),
    ("the Fisher information is given a module", lambda: statistics.fisher_diagonal(outputs, MODULE, X), TypeError,
     "fisher: " + A_MODULE),
    ("the Fisher information is given a seed", lambda: statistics.fisher_diagonal(outputs, PARAMS, X, key=0), TypeError,
     r"fisher: key must be an int32 tensor \(2,\)\. Found 0"),
    ("clipped_sums is given a module", lambda: privacy.clipped_sums(loss, MODULE, X, Y, clipping=FLAT), TypeError,
     "clipped_sums: " + A_MODULE),
    ("scores is given a module", lambda: attribution.scores(outputs, MODULE, X, labels=Y), TypeError,
     "scores: " + A_MODULE),
    ("gradient_cosine is given a module", lambda: attribution.gradient_cosine(loss, MODULE, (X, Y), (X, Y)), TypeError,
     "gradient_cosine: " + A_MODULE),
    ("a kernel is given a module", lambda: attribution.tangent_kernel(outputs, MODULE, (X,)), TypeError,
     "tangent_kernel: " + A_MODULE),
    ("a projection is made for a module", lambda: attribution.projection(MODULE, key=KEY, size=4), TypeError,
     "projection: " + A_MODULE),
    # losses
    ("fit with a loss without a key", lambda: fit(STEP), TypeError, "gradient: loss_fn is " + WITHOUT_KEY),
    ("fit with losses of a batch without keys",
     lambda: fit(train.make_step(train.batch_gradient(loss), SGD)), TypeError,
     "batch_gradient: losses_fn is " + WITHOUT_KEY),
    ("fit with noise and a loss without a key", lambda: fit(train.make_step(train.gradient_with_noise(loss), SGD)),
     TypeError, "gradient_with_noise: loss_fn is " + WITHOUT_KEY),
    ("fit with data values and a loss without a key",
     lambda: fit(train.make_step(train.gradient_with_data_values(loss, (X, Y)), SGD)), TypeError,
     "gradient_with_data_values: loss_fn is " + WITHOUT_KEY),
    ("a loss with a key values validation examples", lambda: train.gradient_with_data_values(loss_with_key, (X, Y)),
     TypeError, r"validation_loss is called with \(params, a tensor, a tensor\)\. Found loss_with_key.*By default"),
    ("fit_private with a loss without a key", lambda: fit_private(private(loss)), TypeError,
     "private step: loss_fn is " + WITHOUT_KEY),
    ("canaries with a loss without a key",
     lambda: train.plant_canaries(loss, PARAMS, SGD, (X, Y), clipping=FLAT, mechanism=POISSON, key=KEY), TypeError,
     "plant_canaries: loss_fn is " + WITHOUT_KEY),
    ("fit with a loss as the step", lambda: fit(loss_with_key), TypeError, r"fit: step is called .*make_step\(loss_fn"),
    ("fit with a private step", lambda: fit(PRIVATE), TypeError, r"fit: .*Found a PrivateStep\. Use fit_private"),
    ("fit_private with an ordinary step", lambda: fit_private(KEYED), TypeError,
     r"fit_private: step must be a PrivateStep.*Found function\. .*use fit"),
    ("a private step of an estimator", lambda: private(train.gradient(loss_with_key)), TypeError,
     r"private step: loss_fn must be the loss of one example.*Found an Estimator"),
    ("a private step of losses of a batch", lambda: fit_private(private(lambda *args: loss_with_key(*args).expand(3))),
     ValueError, r"the loss of one example must be a 0-d tensor\. Found \(3,\)"),
    ("evaluate with a loss of one example", lambda: train.evaluate(outputs, loss, PARAMS, X, Y), TypeError,
     r"evaluate: loss_fn is called with \(outputs, labels\)\. Found loss\(params, x, y\)\. .*losses\.cross_entropy"),
    ("evaluate with a mean", lambda: train.evaluate(outputs, F.cross_entropy, PARAMS, X, Y), ValueError,
     r"evaluate: loss_fn must return one loss per example, \(8,\)\. Found \(\)\. Does it take a mean"),
    ("evaluate with float labels", lambda: train.evaluate(outputs, losses.cross_entropy, PARAMS, X, Y.float()),
     TypeError, r"evaluate: labels must be integers"),
    ("evaluate with outputs at positions",
     lambda: train.evaluate(lambda params, x: x[..., None], losses.cross_entropy, PARAMS, X, Y), ValueError,
     r"evaluate: outputs must be \(N, K\)\. Found \(8, 4, 1\)"),
    ("scores with a loss as the outputs", lambda: attribution.scores(loss, PARAMS, X, labels=Y), TypeError,
     r"scores: outputs_fn is called with \(params, one input\)\. Found loss\(params, x, y\)"),
    ("scores with a loss of parameters", lambda: attribution.scores(outputs, PARAMS, X, labels=Y, loss_fn=loss),
     TypeError, r"scores: loss_fn is called with \(outputs, label\)\. Found loss\(params, x, y\)"),
    ("the Fisher information of a loss", lambda: statistics.fisher_diagonal(loss, PARAMS, X, Y), ValueError,
     r"fisher: the outputs of one example must be \(K,\)\. Found \(\)\. Is it a loss\?"),
    # examples
    ("fit is given one tensor", lambda: fit(examples=X), TypeError, "fit: examples " + TUPLE),
    ("fit_private is given one tensor", lambda: fit_private(examples=X), TypeError, "fit_private: examples " + TUPLE),
    ("data values are given one tensor", lambda: train.gradient_with_data_values(loss, X), TypeError,
     "gradient_with_data_values: validation " + TUPLE),
    ("canaries are given one tensor",
     lambda: train.plant_canaries(loss_with_key, PARAMS, SGD, X, clipping=FLAT, mechanism=POISSON, key=KEY), TypeError,
     "plant_canaries: examples " + TUPLE),
    ("TracIn is given one tensor", lambda: attribution.tracin(loss, [PARAMS], X, X, lrs=[0.1]), TypeError,
     "tracin: train " + TUPLE),
    ("TracIn is given one checkpoint", lambda: attribution.tracin(loss, PARAMS, (X, Y), (X, Y), lrs=[0.1]), TypeError,
     r"tracin: checkpoints must be a list.*Found a dict\. Pass \[params\]\?"),
    ("cosines are given one tensor", lambda: attribution.gradient_cosine(loss, PARAMS, (X, Y), X), TypeError,
     "gradient_cosine: test " + TUPLE),
    ("fit is given lists", lambda: fit(examples=(X.tolist(), Y)), TypeError, r"fit: .*Found \['list', 'Tensor'\]"),
    ("fit is given unequal lengths", lambda: fit(examples=(X, Y[:5])), ValueError, r"fit: .*Found sizes \[5, 8\]"),
    ("a step is given unequal lengths", lambda: STEP(STATE, X, Y[:5]), ValueError, r"step: .*one leading size B"),
    ("fit_private is given unequal lengths", lambda: fit_private(examples=(X, Y[:5])), ValueError, r"Found \[8, 5\]"),
    ("fit is given float labels", lambda: fit(examples=(X, Y.float())), TypeError, "labels must be integers"),
    ("an order of floats", lambda: fit(order=lambda key, epoch: torch.arange(8.0)), ValueError,
     r"fit: an order must be int64 \(8,\)\. Found torch\.float32"),
    ("an order that is a list", lambda: fit(order=lambda key, epoch: list(range(8))), TypeError,
     r"fit: an order must be int64 \(8,\)\. Found list"),
    ("an order of examples that are not there", lambda: fit(order=lambda key, epoch: torch.arange(8) + 3), ValueError,
     r"fit: an order must have numbers in \[0, 8\)\. Found 3 to 10"),
    ("an order that is no function", lambda: fit(order=torch.arange(8)), TypeError,
     r"fit: order must be a function\. Found Tensor\. Pass a function order\(key, epoch\)"),
    ("half an epoch", lambda: fit(epochs=0.5), TypeError, r"fit: epochs must be a whole number\. Found 0\.5"),
    ("one callback", lambda: fit(callbacks=print), TypeError, r"fit: callbacks must be a list.*Pass \[callback\]\?"),
    ("a step as the watch", lambda: fit(watch=KEYED), TypeError, r"fit: watch must be a train\.Watch"),
    # privacy
    ("a secret that is an int", lambda: fit_private(secret=1234), TypeError,
     r"fit_private: secret must be a privacy\.Secret\. Found one of type int\. Pass Secret\(\)"),
    ("a secret that is a key", lambda: fit_private(secret=KEY), TypeError, r"Found one of type Tensor\. Pass Secret"),
    ("a step is given the secret", lambda: PRIVATE(PRIVATE_STATE, SECRET, X, Y), TypeError,
     r"private step: roots must be secret\.roots\(\), \(4, 2\)\. Found one of type Secret"),
    ("a step is given no roots", lambda: PRIVATE(PRIVATE_STATE, X, Y), TypeError,
     r"roots must be secret\.roots\(\), \(4, 2\)\. Found \(8, 4\)"),
    ("a private step of a noise multiplier", lambda: private(mechanism=1.1), TypeError, SAMPLED.format(r"1\.1")),
    ("a private step of a name", lambda: private(mechanism="poisson"), TypeError, SAMPLED.format("'poisson'")),
    ("ε of a noise multiplier", lambda: privacy.epsilon(1.1, steps=1, delta=1e-5), TypeError,
     "epsilon: " + SAMPLED.format(r"1\.1")),
    ("steps of a noise multiplier", lambda: privacy.max_steps(1.1, budget=1.0, delta=1e-5), TypeError,
     "max_steps: " + SAMPLED.format(r"1\.1")),
    ("a draw of a rate", lambda: privacy.draw(0.1, KEY, step=0, population=8), TypeError,
     "draw: " + SAMPLED.format(r"0\.1")),
    ("chunk sizes of a rate", lambda: privacy.chunk_sizes(0.1, 8), TypeError,
     "chunk_sizes: " + SAMPLED.format(r"0\.1")),
    ("calibration of a mechanism", lambda: privacy.calibrated(POISSON, budget=1.0, delta=1e-5, steps=1), TypeError,
     r"calibrated: make must be a function\. Found Poisson"),
    ("calibration of a class", lambda: privacy.calibrated(privacy.Poisson, budget=1.0, delta=1e-5, steps=1), TypeError,
     r"calibrated: make is called with \(noise multiplier\)\. Found Poisson.*lambda sigma"),
    ("composition of a mechanism", lambda: privacy.composed([POISSON], delta=1e-5), TypeError,
     r"composed: events must be privacy\.Events\. Found \['Poisson'\]\. Pass mechanism\.events\(steps\)\?"),
    ("a rule that is a number", lambda: private(clipping=1.0), TypeError, "private step: " + RULE.format(r"1\.0")),
    ("a rule that is a name", lambda: private(clipping="flat"), TypeError, "private step: " + RULE.format("'flat'")),
    ("a state of a mechanism", lambda: train.init_private_state(PARAMS, SGD, KEY, POISSON), TypeError,
     "init_private_state: " + RULE.format("Poisson")),
    ("sums clipped to a number", lambda: privacy.clipped_sums(loss, PARAMS, X, Y, clipping=1.0), TypeError,
     "clipped_sums: " + RULE.format(r"1\.0")),
    ("noise on gradients",
     lambda: privacy.noisy_mean(PARAMS, PARAMS, KEY, clipping=FLAT, noise_multiplier=1.0, expected=4), TypeError,
     r"noisy_mean: sums must be privacy\.Sums\. Found dict\. Take them from privacy\.clipped_sums"),
    ("noise of a mechanism",
     lambda: privacy.noisy_mean(PARAMS, SUMS, KEY, clipping=FLAT, noise_multiplier=POISSON, expected=4), TypeError,
     r"noisy_mean: noise_multiplier must be a number.*Found Poisson\. Pass mechanism\.noise_multiplier\?"),
    ("examples in place of their number", lambda: private(examples=(X, Y)), TypeError,
     r"private step: examples must be N, an int, or privacy\.Users\. Found tuple\. Pass len\(x\)"),
    ("users' ids in place of Users", lambda: private(examples=Y), TypeError,
     r"Found Tensor\. .*Users\(ids, max_examples"),
    ("one chunk size", lambda: private(chunk_sizes=4), TypeError, r"chunk_sizes must be several.*Pass \(size,\)\?"),
    ("an accountant that is not there", lambda: privacy.epsilon(POISSON, steps=1, delta=1e-5, accountant="prv"),
     ValueError, r"epsilon: the accountant must be of pld, rdp, rdp-old, gaussian\. Found 'prv'"),
    ("a unit that is not there", lambda: privacy.Poisson(0.5, 1.0, unit="person"), ValueError,
     r"Poisson: unit must be of example, user\. Found 'person'"),
    ("a correlation that is not there", lambda: privacy.FixedOrder(8, 1.0, "bsr", 4), ValueError,
     r"FixedOrder: correlation must be bisr or cgd\. Found 'bsr'"),
    ("a quantile that is text", lambda: privacy.Quantile("0.5", 1.0), TypeError, r"Quantile: .*number\. Found '0\.5'"),
    ("a ledger of mechanisms", lambda: privacy.Ledger((POISSON,)), TypeError,
     r"Ledger: entries must be .*Found Poisson\. Pass \(Entry\(mechanism"),
    ("a ledger of one entry", lambda: privacy.Ledger(ENTRY), TypeError, r"Found one Entry\. Pass \(entry,\)\?"),
    ("a ledger of one mechanism", lambda: privacy.Ledger(POISSON), TypeError, r"Found Poisson\. Pass \(Entry"),
    ("an audit with a seed", lambda: audit(key=0), TypeError, r"audit: key must be .*Found 0\. .*random\.key"),
    ("an audit of a private step", lambda: audit(PRIVATE), TypeError,
     r"audit: release .*Found PrivateStep\. .*privacy\.pipeline.*train\.plant_canaries"),
    ("an audit of a loss", lambda: audit(loss), TypeError, r"audit: release is called with \(gradients, key\)"),
    ("a bound of a run without canaries", lambda: canaries(4).lower_bound(PRIVATE_STATE), TypeError,
     r"lower_bound: the state must be of a run with canaries\. Found SGDState in .*plant_canaries"),
    ("a bound of parameters", lambda: canaries(4).lower_bound(PARAMS), TypeError, r"lower_bound: .*Found dict"),
    ("a bound of other canaries", lambda: canaries(4).lower_bound(canary_state(6)), ValueError,
     r"lower_bound: .*with 4 canaries\. Found 6\. Is it of another run"),
    # statistics, attribution, sweeps
    ("one-hot labels of a loss", lambda: statistics.fold(loss, PARAMS, X, ONE_HOT, of=statistics.Norms.of), ValueError,
     r"cross_entropy: .*Found \(2,\) and \(2,\)\. Labels are class numbers \(N,\)\. One-hot\? .*y\.argmax\(-1\)"),
    ("one-hot labels of scores", lambda: attribution.scores(outputs, PARAMS, X, labels=ONE_HOT), ValueError, ARGMAX),
    ("one-hot labels of a test", lambda: train.evaluate(outputs, losses.cross_entropy, PARAMS, X, ONE_HOT), ValueError,
     "evaluate: .*" + ARGMAX),
    ("one-hot labels of a private step", lambda: fit_private(examples=(X, ONE_HOT)), ValueError, ARGMAX),
    ("scores of a module", lambda: attribution.scores(MODULE, PARAMS, X, labels=Y), TypeError,
     r"scores: outputs_fn .*Found the module Linear\. .*pass model\.apply"),
    ("scores of a model", lambda: attribution.scores(models.mlp([4, 2]), PARAMS, X, labels=Y), TypeError,
     r"scores: outputs_fn .*Found Model\. Pass model\.apply"),
    ("the Fisher information of a module", lambda: statistics.fisher_diagonal(MODULE, PARAMS, X), TypeError,
     r"fisher: outputs_fn .*Found the module Linear\. .*pass model\.apply"),
    ("a kernel of a module", lambda: attribution.tangent_kernel(MODULE, PARAMS, (X,)), TypeError,
     r"tangent_kernel: outputs_fn .*Found the module Linear\. .*pass model\.apply"),
    ("TracIn with checkpoints first", lambda: attribution.tracin([PARAMS], loss, (X, Y), (X, Y), lrs=[0.1]), TypeError,
     r"tracin: loss_fn must be a function\. Found list\. Pass tracin\(loss_fn, checkpoints, train"),
    ("TracIn with one learning rate", lambda: attribution.tracin(loss, [PARAMS], (X, Y), (X, Y), lrs=0.1), TypeError,
     r"tracin: lrs must be a list.*Found 0\.1\. Pass \[0\.1\]\?"),
    ("TracIn of one test example", lambda: attribution.tracin(loss, [PARAMS], (X, Y), (X[0], Y[0]), lrs=[0.1]),
     ValueError, r"one leading size B.*One example\? Pass x\[None\], y\[None\]"),
    ("a statistic's class", lambda: fold(statistics.Norms), TypeError,
     r"fold: of must be a function of Gradients\. Found the class Norms\. Pass Norms\.of\?"),
    ("a statistic's name", lambda: fold("norms"), TypeError, r"fold: of must be a function\. Found 'norms'"),
    ("several statistics", lambda: fold((statistics.Norms.of, statistics.Moments.of)), TypeError,
     r"fold: of must be one function.*Found tuple\. .*lambda g: \(Norms\.of\(g\), Moments\.of\(g\)\)"),
    ("a statistic without its direction", lambda: fold(statistics.Alignment.of), TypeError,
     r"fold: of is called with \(gradients\)\..*partial\(Alignment\.of, direction=…\)"),
    ("features of a size", lambda: attribution.features(loss, PARAMS, X, Y, projection=16), TypeError,
     r"features: projection must be a Projection\. Found 16\. .*attribution\.projection\(params"),
    ("self-influence of lists", lambda: attribution.self_influence([X[:, 0]], [0.1]), TypeError,
     r"self_influence: .*must be tensors\. Found list and list\. Stack"),
    ("a list of outputs", lambda: ensemble.mean([X, X]), TypeError,
     r"ensemble\.mean: .*Found list\. Pass torch\.stack"),
    ("a grid of a number", lambda: sweep.grid(lr=0.1), TypeError,
     r"grid: lr must be a list.*Found 0\.1\. Pass \[0\.1\]"),
    ("a grid of a number of seeds", lambda: sweep.grid(seeds=5, lr=[0.1]), TypeError, r"seeds .*Pass range\(5\)\?"),
    ("a range that is a pair", lambda: sweep.random_search(KEY, 4, lr=(0.0, 1.0)), TypeError,
     r"random_search: lr must be a Uniform, LogUniform or OneOf\. Found \(0\.0, 1\.0\)\. Pass sweep\.Uniform"),
    ("a scale that is a name", lambda: sweep.tune(None, {"lr": X[0, 0]}, scales={"lr": "log"}, rounds=1), TypeError,
     r"tune: a scale must be a sweep\.Scale.*Found 'log'.*Pass sweep\.LOG"),
    ("inputs that are a list", lambda: hypergradient([(X[0, 0],)]), TypeError,
     r"hypergradient: inputs must be a function\. Found list\. .*lambda t"),
    ("inputs that are one tensor", lambda: hypergradient(lambda t: X[0, 0]), TypeError,
     r"hypergradient: inputs\(t\) must be a tuple of tensors\. Found one tensor\. Return \(x,\)\?"),
    ("a precision that is a name", lambda: train.in_precision(outputs, "bfloat16"), TypeError,
     r"in_precision: dtype must be a float type of torch\. Found 'bfloat16'\. Pass torch\.bfloat16\?"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "said"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_answered_with_its_rule_and_its_remedy(call, error, said):
    with pytest.raises(error, match=said):
        call()
