"""Hourly counts of a bike rental service, 2011 and 2012, features in their natural units."""

import csv
import datetime
import functools
import io
import lzma
from pathlib import Path

import numpy as np

from experiments.material.data import SPLIT_SEED, Split, checked

FILE = Path(__file__).parent / "files/bike-rental.csv.xz"
SHA256 = "c4a9e038dc87d9f756beee39d6f833846c16d64397c52101a65b87eab03a5c8c"
FEATURES = (
    "day since 2011-01-01", "hour", "weekday (Monday is 0)", "working day", "holiday",
    "temperature / °C", "felt temperature / °C", "humidity / %", "wind speed / (km/h)",
    "clear", "mist", "rain or snow",
)  # fmt: skip
TEST_FRACTION = 0.2


@functools.cache
def load_bikes() -> Split:
    """Features (n, 12) float32, unscaled, in the order of `FEATURES`, and rentals in that hour (n,) float32.

    17,379 hours of 731 days; whole days, a fifth of them drawn at random with `SPLIT_SEED`, are for testing, since
    neighbouring hours are alike. Where the weather was not recorded its three columns are 0; the weekday is
    taken from the date. Rentals are never inputs, nor are the two counts that add up to them.

    Source: files/README.md.

    Raises:
      ValueError: the file is not the one these experiments were written for (SHA-256).
    """
    content = lzma.decompress(checked(FILE, SHA256, "check the file out afresh")).decode()
    rows = sorted(csv.DictReader(io.StringIO(content)), key=lambda row: (row["dteday"], hour(row["hr"])))
    days = np.array([since_start(row["dteday"]) for row in rows])
    x = np.array([features(row) for row in rows], np.float32)
    y = np.array([float(row["cnt"]) for row in rows], np.float32)

    rng = np.random.default_rng(SPLIT_SEED)
    every = np.unique(days)
    test = np.isin(days, rng.permutation(every)[: round(TEST_FRACTION * len(every))])
    return Split(x[~test], y[~test], x[test], y[test])


def features(row: dict[str, str]) -> list[float]:
    """One row of the file as numbers, in the order of `FEATURES`."""
    weather = row["weathersit"]
    return [
        since_start(row["dteday"]),
        hour(row["hr"]),
        datetime.date.fromisoformat(row["dteday"]).weekday(),
        row["workingday"] == "Yes",
        row["holiday"] == "Yes",
        *(float(row[name]) for name in ("temp", "atemp", "hum", "windspeed")),
        weather == "Clear",
        weather == "Mist",
        weather in ("Light Rain", "Heavy Rain"),
    ]


def since_start(date: str) -> int:
    """Days since the first of January 2011."""
    return (datetime.date.fromisoformat(date) - datetime.date(2011, 1, 1)).days


def hour(text: str) -> int:
    """0 to 23, of 12am to 11pm."""
    return int(text[:-2]) % 12 + 12 * text.lower().endswith("pm")  # strptime's %p is the locale's
