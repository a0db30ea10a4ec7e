"""What starts the credit pipeline by itself; switch it on in the UI, under Automation.

The daily schedule comes with the pipeline: `credit_schedule` decides a day's applications when the day is over. `credit_reports` then
reports on the newest day's decisions as soon as there are any, whoever started the run that made them.
"""

import dagster as dg

from assets.fairness import decision_report

credit_reports = dg.AutomationConditionSensorDefinition(
    "credit_reports",
    target=dg.AssetSelection.assets(decision_report),
    description="Reports on decisions when new ones were sealed",
)
