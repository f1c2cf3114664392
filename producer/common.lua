-- Put before the scripts that change jobs, the worker's too. RQ's records of one execution are in four places.

-- Longest time to live; Redis takes no number that Lua would print with an exponent.
local MAX_TTL = 1000000000

-- A time to live that stands in a hash, or the default: whole, -1 for good, and never more than Redis takes.
local function seconds(field, default)
  local value = tonumber(field or '')
  if not value or value ~= value then
    value = default
  end
  return math.max(-1, math.min(MAX_TTL, math.floor(value)))
end

local function wip_key(prefix, queue)
  return prefix .. ':wip:' .. queue
end

-- Drops every record of one execution.
local function end_execution(prefix, queue, id, execution, worker)
  local pair = id .. ':' .. execution
  redis.call('ZREM', wip_key(prefix, queue), pair)
  redis.call('ZREM', prefix .. ':executions:' .. id, execution)
  redis.call('DEL', prefix .. ':execution:' .. pair)
  redis.call('SREM', prefix .. ':worker:' .. worker .. ':executions', pair)
end

