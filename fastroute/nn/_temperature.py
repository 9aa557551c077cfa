"""The temperature of a router's softmax, which may change while it trains."""

import math


class Tempered:
    """A module whose gates are softmax(A / T): even gates as T grows, a choice of one path as T falls to 0.

    `temperature` is a plain attribute, not a parameter and not in the state dict: assign to it between steps to anneal.
    A compiled module is compiled anew for the first other temperature alone.
    """

    @property
    def temperature(self) -> float:
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not 0 < value < math.inf:
            raise ValueError(f"temperature is {value}; it must be positive and finite")
        self._temperature = float(value)
