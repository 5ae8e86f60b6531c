"""`hydra-ssm data prepare`: text of any size as shards of packed token rows, and those shards as rows to train on."""
