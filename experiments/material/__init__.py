"""What experiments are about: data sets, models, a training loop, shapes of networks."""
