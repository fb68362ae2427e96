"""What every edgebolt package stands on: federated rounds, devices and their clock, messages and their bytes."""
