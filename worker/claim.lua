-- Takes jobs off queues in priority order and leases them to one worker, in one step: a job is at every moment
-- either on its queue or leased. Sent again with the same nonce, after a lost reply, it tells the same claims.
--
-- KEYS[1]  the key that exists while `rq suspend` is in force
-- KEYS[2]  the worker's hash
-- KEYS[3]  the set of the worker's executions
-- KEYS[4]  the nonce of the worker's last claim
-- KEYS[5+] the queues' lists, the most urgent first
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the worker's name
-- ARGV[3]  now, as RQ writes a time
-- ARGV[4]  the lease, in seconds
-- ARGV[5]  at most so many jobs
-- ARGV[6]  no further job once those taken cost so many bytes: their data, but BYTES_PER_TEXT a text at least
-- ARGV[7]  the nonce: what the execution ids begin with, unique to this call
-- ARGV[8+] the queues' names, as many as lists
--
-- Returns {suspended 0|1, job, job, ...}; each job is {queue name, id, execution id, data, enqueued_at}, data
-- false where the hash has none.

local BYTES_PER_TEXT = 8 -- so that a job of many empty texts, which compress to nothing, is not free

local prefix, worker, now, lease = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local max_jobs, max_bytes, nonce = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]

local function told(queue, id, execution, data, enqueued_at)
  return {queue, id, execution, data, enqueued_at or ''}
end

-- The claims of the call before, whose reply was lost, in their order.
local function tell_again()
  local places, jobs = {}, {}
  for _, pair in ipairs(redis.call('SMEMBERS', KEYS[3])) do
    local id, execution = string.match(pair, '^([^:]*):(.*)$')
    if id and string.sub(execution, 1, #nonce + 1) == nonce .. '-' then
      local queue = redis.call('HGET', prefix .. ':execution:' .. pair, 'queue')
      local fields = redis.call('HMGET', prefix .. ':job:' .. id, 'status', 'data', 'enqueued_at')
      if queue and fields[1] == 'started' then
        local place = tonumber(string.sub(execution, #nonce + 2))
        places[#places + 1] = place
        jobs[place] = told(queue, id, execution, fields[2], fields[3])
      end
    end
  end
  table.sort(places)
  local again = {0}
  for _, place in ipairs(places) do
    again[#again + 1] = jobs[place]
  end
  return again
end

if redis.call('GET', KEYS[4]) == nonce then
  return tell_again()
end
if redis.call('EXISTS', KEYS[1]) == 1 then
  return {1}
end

local started = clock()
local keep = math.ceil(lease) + 3600
local claimed, bytes = {0}, 0

local function claim(queue, id)
  local key = prefix .. ':job:' .. id
  local fields = redis.pcall('HMGET', key, 'status', 'data', 'enqueued_at', 'embedq_texts')
  -- Vanished, canceled or never a job: nothing to do for it. (pcall: a key of another type.)
  if fields.err or (fields[1] and fields[1] ~= 'queued') or redis.call('EXISTS', key) == 0 then
    return
  end
  local execution = nonce .. '-' .. #claimed
  local pair = id .. ':' .. execution
  redis.call('HSET', prefix .. ':execution:' .. pair, 'id', execution, 'job_id', id, 'worker_name', worker, 'queue', queue,
    'created_at', string.format('%.6f', started), 'last_heartbeat', string.format('%.6f', started))
  redis.call('EXPIRE', prefix .. ':execution:' .. pair, keep)
  redis.call('ZADD', prefix .. ':executions:' .. id, started + keep, execution)
  redis.call('EXPIRE', prefix .. ':executions:' .. id, keep)
  redis.call('ZADD', wip_key(prefix, queue), started + lease, pair)
  redis.call('SADD', KEYS[3], pair)
  redis.call('HSET', key, 'status', 'started', 'started_at', now, 'last_heartbeat', now, 'worker_name', worker,
    'origin', queue)
  redis.call('PERSIST', key)
  claimed[#claimed + 1] = told(queue, id, execution, fields[2], fields[3])
  bytes = bytes + math.max(#(fields[2] or ''), BYTES_PER_TEXT * (tonumber(fields[4] or '') or 1))
end

for i = 5, #KEYS do
  local queue = ARGV[3 + i]
  while #claimed <= max_jobs and bytes < max_bytes do
    local id = redis.call('LPOP', KEYS[i])
    if not id then
      break
    end
    claim(queue, id)
  end
end

if #claimed > 1 then
  redis.call('SET', KEYS[4], nonce, 'EX', 300)
  redis.call('EXPIRE', KEYS[3], keep)
  if redis.call('EXISTS', KEYS[2]) == 1 then
    redis.call('HSET', KEYS[2], 'state', 'busy')
  end
end
return claimed
