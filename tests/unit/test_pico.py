"""The pico task of the benchmarks: its grammar, its reward and its labels, without a model."""

import json

import numpy as np
import pytest

from benchmarks.findings.pico import (
    NUM_CLASSES,
    NUM_TOKENS,
    NUM_TOPICS,
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    TOKENS,
    WORDS_PER_CLASS,
    Grammar,
    draw_reward,
    label,
)


def texts_of(topic: int, count: int) -> np.ndarray:
    return Grammar().texts(np.full(count, topic), np.random.default_rng(0))


def some_responses(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    grammar, rng = Grammar(), np.random.default_rng(1)
    topics = rng.integers(NUM_TOPICS, size=count)
    first, second = grammar.texts(topics, rng), grammar.texts(topics, rng)
    return first[:, :PROMPT_LENGTH], first[:, PROMPT_LENGTH:], second[:, PROMPT_LENGTH:]


def test_a_text_is_a_topic_and_then_words():
    texts = texts_of(3, 50)
    assert texts.shape == (50, PROMPT_LENGTH + RESPONSE_LENGTH)
    assert (texts[:, 0] == 3).all()
    assert texts[:, 1:].min() >= NUM_TOPICS
    assert texts[:, 1:].max() < NUM_TOKENS == len(TOKENS) == len(set(TOKENS))


@pytest.mark.parametrize("topic", [0, NUM_TOPICS - 1])
def test_classes_follow_the_topics_chain_and_words_zipfs_law(topic: int):
    words = texts_of(topic, 4000)[:, 1:] - NUM_TOPICS
    classes, ranks = words // WORDS_PER_CLASS, words % WORDS_PER_CLASS
    counts = np.zeros((NUM_CLASSES, NUM_CLASSES))
    np.add.at(counts, (classes[:, :-1].ravel(), classes[:, 1:].ravel()), 1)
    seen = counts.sum(axis=1) > 500
    assert seen.any()
    shares = counts[seen] / counts[seen].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, Grammar().transitions[topic][seen], atol=0.08)
    frequencies = np.bincount(ranks.ravel(), minlength=WORDS_PER_CLASS) / ranks.size
    np.testing.assert_allclose(frequencies[0] / frequencies, np.arange(1, WORDS_PER_CLASS + 1), rtol=0.1)


def test_the_first_topic_leaves_less_open_than_the_last():
    chains = Grammar().transitions
    entropy = -(chains * np.log(np.maximum(chains, 1e-300))).sum(-1).mean(-1)
    assert entropy[0] < 0.7 * entropy[-1]


def test_a_reward_is_standardised_on_the_samples_given():
    prompts, first, second = some_responses(500)
    reward = draw_reward(np.random.default_rng(2), contextual=True).standardised(prompts, first)
    values = reward(prompts, first)
    assert values.mean() == pytest.approx(0, abs=1e-12)
    assert values.std() == pytest.approx(1)
    assert abs(reward(prompts, second).mean()) < 0.2


def test_only_a_contextual_reward_depends_on_the_topic():
    prompts, first, _ = some_responses(20)
    others = prompts.copy()
    others[:, 0] = (others[:, 0] + 1) % NUM_TOPICS
    for contextual in (False, True):
        reward = draw_reward(np.random.default_rng(3), contextual=contextual)
        assert np.allclose(reward(prompts, first), reward(others, first)) is not contextual


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_that_share_of_the_labels_is_wrong(noise: float):
    prompts, first, second = some_responses(4000)
    reward = draw_reward(np.random.default_rng(4), contextual=True)
    pairs = label(reward, prompts, first, second, np.random.default_rng(5), noise=noise)
    wrong = (reward(prompts, pairs.chosen) < reward(prompts, pairs.rejected)).mean()
    assert wrong == pytest.approx(noise, abs=4 * np.sqrt(noise * (1 - noise) / len(prompts)))


def test_rows_are_pairs_as_the_pipeline_reads_them(tmp_path):
    prompts, first, second = some_responses(3)
    reward = draw_reward(np.random.default_rng(6), contextual=False)
    pairs = label(reward, prompts, first, second, np.random.default_rng(7), noise=0.0)
    rows = [json.loads(line) for line in pairs.write(tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [row.keys() for row in rows] == [{"prompt", "chosen", "rejected"}] * 3
    assert rows[0]["prompt"].split() == [TOKENS[token] for token in prompts[0]]
    assert len(rows[0]["chosen"].split()) == RESPONSE_LENGTH
