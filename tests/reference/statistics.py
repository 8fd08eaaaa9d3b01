"""The textbook form of Student's t in evaluation/results."""

import math


def student_t(freedom):
    """Return the 97.5 % quantile of Student's t by bisection (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        odd = freedom % 2
        term = math.sin(angle) * (math.cos(angle) if odd else 1)
        inside = 0.0
        for power in range(odd, freedom - 1, 2):
            inside += term
            term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
        if odd:
            inside = (angle + inside) * 2 / math.pi
        low, high = (angle, high) if inside < 0.95 else (low, angle)
    return math.tan(low) * math.sqrt(freedom)
