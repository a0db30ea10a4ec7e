"""What starts the credit pipeline by itself; seen in the UI, under Automation.

The daily schedule comes with the pipeline, and is on: `credit_schedule` decides a day's applications when the day is over. Once it is
switched on, `credit_reports` reports on the newest day's decisions as soon as there are any, whoever started the run that made them.
"""

import dagster as dg

from assets.fairness import decision_report

credit_reports = dg.AutomationConditionSensorDefinition(
    "credit_reports",
    target=dg.AssetSelection.assets(decision_report),
    description="Reports on decisions when new ones were sealed",
)
