"""lightning-ppo: PPO for language models that anyone can run, read and trust."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises a package that this project does not call
