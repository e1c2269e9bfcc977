"""The time of a step on chips that are not here: a model of each launch, by its code and the chip's figures."""
