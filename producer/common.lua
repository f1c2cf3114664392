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

-- Clears the way for a key of ours where somebody put one of another type, of which no RQ tool can make anything. The
-- first thing in a script: one that raised half-way would leave half of its work.
-- pcall: a user who may not look at the key may not write there either, and learns of it where that matters.
local function clear_way(kind, key)
  local found = redis.pcall('TYPE', key).ok
  if found and found ~= kind and found ~= 'none' then
    redis.call('DEL', key)
  end
end

-- Now in seconds, by the server's clock: those of the hosts may differ.
local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end

-- Now by the server's clock as RQ writes a time, `2026-01-31T23:59:59.123456Z`. Days to a date as in Howard Hinnant's
-- `civil_from_days`; Redis' Lua has no os.date.
local function timestamp()
  local time = redis.call('TIME')
  local second = tonumber(time[1])
  local day, rest = math.floor(second / 86400), second % 86400
  local z = day + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06dZ', year, month, doy - math.floor((153 * mp + 2) / 5) + 1,
    math.floor(rest / 3600), math.floor(rest % 3600 / 60), rest % 60, tonumber(time[2]))
end

-- A job waits from now on: for so long as its `ttl` says, or for good.
local function start_waiting(key, ttl_field)
  local ttl = seconds(ttl_field, 0)
  if ttl > 0 then
    redis.call('EXPIRE', key, ttl)
  else
    redis.call('PERSIST', key)
  end
end

local function wip_key(prefix, queue)
  return prefix .. ':wip:' .. queue
end

-- Drops every record of one execution.
local function end_execution(prefix, queue, id, execution, worker)
  local pair = id .. ':' .. execution
  redis.call('ZREM', wip_key(prefix, queue), pair)
  -- pcall: keys that may be of another type, and the worker's name is whatever the execution's record says.
  redis.pcall('ZREM', prefix .. ':executions:' .. id, execution)
  redis.call('DEL', prefix .. ':execution:' .. pair)
  redis.pcall('SREM', prefix .. ':worker:' .. worker .. ':executions', pair)
end

-- The status that a call with this nonce found when it was sent first; nil if it is sent for the first time. `change`
-- is the job's field embedq_change: the nonce of the last cancellation or requeueing, and what it found.
local function found_before(change, nonce)
  if change and string.sub(change, 1, #nonce + 1) == nonce .. ' ' then
    return string.sub(change, #nonce + 2)
  end
end
