"""The sampler against plain re-statements of what each setting means."""

import json

import numpy as np
import pytest

from mmmamba_edge.errors import UserError
from mmmamba_edge.sampling import Sampler


def logits_of(probabilities):
    return np.log(np.asarray(probabilities, np.float64)).astype(np.float32)


def frequencies(sampler, logits, draws=4000):
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=len(logits))
    return counts / draws


def test_greedy_takes_the_first_of_the_largest():
    assert Sampler().sample(np.array([0.0, 3.0, 3.0, 1.0], np.float32)) == 1


def test_plain_sampling_follows_the_softmax():
    wanted = np.array([0.5, 0.3, 0.15, 0.05])
    found = frequencies(Sampler(temperature=1.0, seed=1), logits_of(wanted))
    np.testing.assert_allclose(found, wanted, atol=0.03)


def test_temperature_flattens_and_sharpens():
    p = np.array([0.6, 0.3, 0.1])
    for temperature in (0.5, 2.0):
        wanted = p ** (1 / temperature)
        found = frequencies(Sampler(temperature=temperature, seed=2), logits_of(p))
        np.testing.assert_allclose(found, wanted / wanted.sum(), atol=0.03)


def test_a_tiny_temperature_is_greedy_without_a_warning():
    assert Sampler(temperature=1e-300).sample(np.array([-4.0, 5.0, 4.9], np.float32)) == 1


def test_top_k_draws_among_exactly_k_and_breaks_ties_by_id():
    logits = np.array([1.0, 2.0, 1.0, 1.0, 0.0], np.float32)
    found = frequencies(Sampler(temperature=1.0, top_k=2, seed=3), logits)
    assert set(np.flatnonzero(found)) == {0, 1}


def test_top_k_beyond_the_vocabulary_keeps_all():
    found = frequencies(Sampler(temperature=1.0, top_k=99, seed=3), np.zeros(4, np.float32))
    assert np.all(found > 0)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, {2}), (0.5, {2}), (0.51, {0, 2}), (0.8, {0, 2}), (0.95, {0, 1, 2})]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    logits = logits_of([0.30, 0.15, 0.5000001, 0.0499999])
    found = frequencies(Sampler(temperature=1.0, top_p=top_p, seed=4), logits, draws=600)
    assert set(np.flatnonzero(found)) == kept


def test_top_p_is_taken_after_top_k_on_what_is_left():
    # Of [.4 .3 .2 .1], top-k 2 leaves [.57 .43]: 0.5 keeps the first alone, 0.6 both.
    logits = logits_of([0.4, 0.3, 0.2, 0.1])
    for top_p, kept in ((0.5, {0}), (0.6, {0, 1})):
        found = frequencies(Sampler(temperature=1, top_k=2, top_p=top_p, seed=5), logits, draws=400)
        assert set(np.flatnonzero(found)) == kept


def test_top_p_equals_a_plain_sorted_implementation_on_a_large_vocabulary():
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal(5000) * 3).astype(np.float32)
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    nucleus = set(order[before < 0.7])
    sampler = Sampler(temperature=1.0, top_p=0.7, seed=6)
    drawn = {sampler.sample(logits) for _ in range(3000)}
    assert drawn <= nucleus
    assert {int(i) for i in order[:20]} <= drawn


def test_repetition_penalty_is_the_hugging_face_rule():
    logits = np.array([2.0, 1.9, -1.0, -1.5], np.float32)
    sampler = Sampler(repetition_penalty=2.0)
    sampler.see([0])
    assert sampler.sample(logits) == 1  # 2.0 / 2 < 1.9
    assert sampler.sample(logits) == 0  # both halved now: 1.0 > 0.95
    below = np.array([-1.0, -9.0, -1.5, -9.0], np.float32)
    assert sampler.sample(below) == 2  # -1.0 is multiplied, for it is negative: -2.0 < -1.5
    assert Sampler(repetition_penalty=1.0).sample(logits) == 0


def test_the_given_logits_are_left_alone():
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    sampler = Sampler(temperature=0.5, top_k=2, top_p=0.9, repetition_penalty=1.3)
    sampler.see(np.array([2]))
    sampler.sample(logits)
    np.testing.assert_array_equal(logits, [1.0, 2.0, 3.0])


def test_seeds_repeat_and_differ():
    logits = np.zeros(1000, np.float32)
    draws = [
        [sampler.sample(logits) for _ in range(8)]
        for sampler in (Sampler(temperature=1, seed=s) for s in (7, 7, 8))
    ]
    assert draws[0] == draws[1] != draws[2]


def test_the_random_stream_is_fixed_for_ever():
    sampler = Sampler(temperature=1.0, seed=0)
    assert [sampler.sample(np.zeros(1000, np.float32)) for _ in range(5)] == [636, 269, 40, 16, 813]


def test_saved_and_restored_it_goes_on_exactly():
    logits = np.random.default_rng(1).standard_normal(300).astype(np.float32)
    sampler = Sampler(temperature=1.5, top_p=0.95, top_k=200, repetition_penalty=1.2, seed=9)
    sampler.see([3, 4])
    for _ in range(20):
        sampler.sample(logits)
    twin = Sampler.from_dict(json.loads(json.dumps(sampler.to_dict())), sampler.seen)
    copy = sampler.copy()
    rest = [sampler.sample(logits) for _ in range(50)]
    assert rest == [twin.sample(logits) for _ in range(50)]
    assert rest == [copy.sample(logits) for _ in range(50)]


def test_memory_does_not_grow_with_the_answer():
    sampler = Sampler(temperature=1.0, repetition_penalty=1.1)
    logits = np.zeros(64, np.float32)
    sampler.sample(logits)
    before = sampler.seen.nbytes
    for _ in range(500):
        sampler.sample(logits)
    assert sampler.seen.nbytes == before == 64


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1}, "temperature is -1; expected 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0; expected above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1; expected a whole number"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected above 0"),
        ({"seed": -2}, "seed is -2; expected a whole number"),
        ({"seed": "x"}, "seed is 'x'"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(UserError, match=message):
        Sampler(**setting)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(bad, temperature):
    with pytest.raises(UserError, match="logits are not finite"):
        Sampler(temperature=temperature).sample(np.array([0.0, bad, 1.0], np.float32))


def test_a_damaged_saved_state():
    data = Sampler().to_dict()
    with pytest.raises(UserError, match="sampler state: KeyError"):
        Sampler.from_dict({k: v for k, v in data.items() if k != "random"}, np.zeros(0, np.bool_))
