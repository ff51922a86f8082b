-- Health of a TPModel for Argo CD. In the ConfigMap argocd-cm:
--   resource.customizations.health.tpmodel.dev_TPModel: |
--     <this file>

local status = obj.status
if status == nil or status.conditions == nil or status.observedGeneration ~= obj.metadata.generation then
  return {status = "Progressing", message = "the operator has not seen this spec yet"}
end

local conditions = {}
for _, condition in ipairs(status.conditions) do
  conditions[condition.type] = condition
end

local function holds(name)
  return conditions[name] ~= nil and conditions[name].status == "True"
end

local function told(name)
  local condition = conditions[name]
  if condition == nil then
    return ""
  end
  if condition.message == nil or condition.message == "" then
    return condition.reason or ""
  end
  return condition.message
end

if conditions.Accepted ~= nil and conditions.Accepted.status == "False" then
  return {status = "Degraded", message = told("Accepted")}
end
if holds("Stalled") then
  return {status = "Degraded", message = told("Stalled")}
end
if obj.spec.replicas == 0 and holds("Ready") and not holds("Progressing") then
  return {status = "Suspended", message = "scaled to zero"}
end
if holds("Progressing") then
  return {status = "Progressing", message = told("Progressing")}
end
if holds("Ready") then
  return {status = "Healthy", message = told("Ready")}
end
return {status = "Degraded", message = told("Ready")}
