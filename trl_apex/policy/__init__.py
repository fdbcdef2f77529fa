"""What the policy is, shared by rollout and update: pipeline, schedule, guided prediction, transition."""
