pytest_plugins = ["sampled"]
