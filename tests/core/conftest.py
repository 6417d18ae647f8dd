pytest_plugins = ["sampled", "campaign"]
