"""Record a forward pass, pull vectors back through it sample by sample, certify the answer;
imports from `passes`, `layers` and
`reductions`."""
