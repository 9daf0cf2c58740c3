"""lightning-ppo: PPO for language models that anyone can run, read and trust."""
