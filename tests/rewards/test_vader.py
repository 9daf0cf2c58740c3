"""VADER judges the whole text."""

from __future__ import annotations

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from src.rewards.vader import Vader


def test_the_score_is_the_compound_of_prompt_and_response() -> None:
    """Checklist 24. "not" in the prompt turns the response round."""
    prompts, responses = ["The film was", "The film was not"], [" good.", " good."]
    scores = Vader().score(prompts, responses, [{}, {}])
    judge = SentimentIntensityAnalyzer()
    expected = [judge.polarity_scores(text)["compound"] for text in ("The film was good.", "The film was not good.")]
    assert scores == expected
    assert scores[0] > 0 > scores[1]
