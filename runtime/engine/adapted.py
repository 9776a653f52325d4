"""A model's adapters for one batch: which rows have chosen which."""

from __future__ import annotations

from copy import copy

from dgq.runtime.adapters.beside import Choice, Chosen, check_choice
from dgq.runtime.model.model import Model


def choose(model: Model, chosen: Chosen, rows: int) -> None:
    """Choose the adapters of the next batch in the model's session. InputError for one that is not loaded."""
    choice = model.choice
    check_choice(choice.adapters if choice else None, chosen)
    if choice is None:
        return
    numbers = choice.adapters.numbers(chosen, rows)
    if rows > choice.rows:
        model.drop_session()  # its graphs read the smaller one
        choice.grow(rows)
    choice.set(numbers)


def choosing(model: Model, chosen: Chosen, rows: int) -> Model:
    """The model for a batch of so many rows that has a choice of its own; weights are shared, and it has no session.
    InputError for an adapter that is not loaded."""
    check_choice(model.choice.adapters if model.choice else None, chosen)
    if model.choice is None:
        return model
    choice = Choice(model.choice.adapters, rows)
    choice.set(choice.adapters.numbers(chosen, rows))
    other = copy(model)
    other.use(choice)
    return other
