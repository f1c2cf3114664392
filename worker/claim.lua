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
-- ARGV[3]  the lease, in seconds
-- ARGV[4]  at most so many jobs
-- ARGV[5]  no further job once those taken cost so many bytes: their data, but BYTES_PER_TEXT a text at least
-- ARGV[6]  the nonce: what the execution ids begin with, unique to this call
-- ARGV[7]  '1' to be told the traces that jobs belong to
-- ARGV[8+] the queues' names, as many as lists
--
-- Returns {now in seconds, state, job, job, ...}. State: 'suspended', 'empty' if the queues are, else 'more'. Each job
-- is {queue name, id, execution id, data, enqueued_at}, data false where the hash has none, and only its length where
-- it is longer than MAX_DATA_BYTES; one that was tried before has two items more: how often, and its retries left. One
-- that belongs to a trace has these two in any case, and after them its traceparent and its tracestate ('' if it has
-- none), as somebody has written them.

local BYTES_PER_TEXT = 8 -- so that a job of many empty texts, which compress to nothing, is not free
local MAX_TEXTS = 1024 -- of a job; what it says of itself is not to be believed
local MAX_DATA_BYTES = 67108864 -- as in producer/wire.py: no request of ours has more, and no worker has to take it
local MAX_TIME_BYTES = 64
local MAX_TRACE_BYTES = 512
local LOOK_AHEAD = 100 -- ids read off a list at a time
local MAX_LOOKS = 10000 -- ids looked at in one call, however many of them are jobs that vanished
local FIELDS = {'status', 'data', 'enqueued_at', 'embedq_texts', 'embedq_attempts', 'embedq_retries', 'retries_left'}

local prefix, worker, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
if ARGV[7] == '1' then
  FIELDS[8], FIELDS[9] = 'embedq_traceparent', 'embedq_tracestate'
end
local max_jobs, max_bytes, nonce = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local started, now = clock(), timestamp()
local second = string.format('%.6f', started)

-- fields: of the job's hash, those of FIELDS.
local function told(queue, id, execution, fields)
  local data, enqueued_at = fields[2], fields[3] or ''
  if data and #data > MAX_DATA_BYTES then
    data = #data
  end
  if #enqueued_at > MAX_TIME_BYTES then
    enqueued_at = ''
  end
  -- Most jobs are as they were enqueued: no counter, and all of their retries left.
  local tried = (fields[5] or fields[6] ~= fields[7]) and attempts(fields[5], fields[6], fields[7]) or 0
  local trace, state = fields[8], fields[9] or ''
  if trace and #trace <= MAX_TRACE_BYTES then
    state = #state <= MAX_TRACE_BYTES and state or ''
    return {queue, id, execution, data, enqueued_at, tried, math.max(0, seconds(fields[7], 0)), trace, state}
  elseif tried == 0 then
    return {queue, id, execution, data, enqueued_at}
  end
  return {queue, id, execution, data, enqueued_at, tried, math.max(0, seconds(fields[7], 0))}
end

-- The claims of the call before, whose reply was lost, in their order.
local function tell_again()
  local places, jobs = {}, {}
  for _, pair in ipairs(redis.call('SMEMBERS', KEYS[3])) do
    local id, execution = string.match(pair, '^(.*):([^:]*)$')
    if id and string.sub(execution, 1, #nonce + 1) == nonce .. '-' then
      local queue = redis.pcall('HGET', prefix .. ':execution:' .. pair, 'queue')
      local fields = redis.pcall('HMGET', prefix .. ':job:' .. id, unpack(FIELDS))
      if type(queue) == 'string' and fields[1] == 'started' then
        local place = tonumber(string.sub(execution, #nonce + 2))
        places[#places + 1] = place
        jobs[place] = told(queue, id, execution, fields)
      end
    end
  end
  table.sort(places)
  local again = {second, 'more'}
  for _, place in ipairs(places) do
    again[#again + 1] = jobs[place]
  end
  return again
end

clear_way('hash', KEYS[2])
clear_way('set', KEYS[3])
clear_way('string', KEYS[4])
for i = 5, #KEYS do
  clear_way('list', KEYS[i])
  clear_way('zset', wip_key(prefix, ARGV[3 + i]))
end
if redis.call('GET', KEYS[4]) == nonce then
  return tell_again()
end
if redis.call('EXISTS', KEYS[1]) == 1 then
  return {second, 'suspended'}
end

local keep = math.ceil(lease) + 3600
local claimed, num_claimed, bytes = {second, 'more'}, 0, 0
local all_pairs, leases = {}, {}

local call, job_prefix, execution_prefix = redis.call, prefix .. ':job:', prefix .. ':execution:'
local executions_prefix, keep_until, lease_until = prefix .. ':executions:', started + keep, started + lease

-- Executions whose job was canceled and put back by somebody without a right to their records.
local function end_others(queue, id, execution)
  for _, other in ipairs(call('ZRANGE', executions_prefix .. id, 0, -1)) do
    if other ~= execution then
      local holder = redis.pcall('HGET', execution_prefix .. id .. ':' .. other, 'worker_name')
      end_execution(prefix, queue, id, other, type(holder) == 'string' and holder or '')
    end
  end
end

local function claim(queue, id)
  local key = job_prefix .. id
  local fields = redis.pcall('HMGET', key, unpack(FIELDS))
  local status, data = fields[1], fields[2]
  -- Vanished, canceled or never a job: nothing to do for it. (pcall: a key of another type.)
  if fields.err or (status or 'queued') ~= 'queued' or (not status and call('EXISTS', key) == 0) then
    return
  end
  local execution = nonce .. '-' .. num_claimed + 1
  local pair = id .. ':' .. execution
  local record, records = execution_prefix .. pair, executions_prefix .. id
  -- First what may raise: the server may be full, or the key of another type.
  local reply = redis.pcall('ZADD', records, keep_until, execution)
  if is_error(reply) then
    drop_other_type(records, reply)
    call('ZADD', records, keep_until, execution)
  end
  if call('ZCARD', records) > 1 then
    end_others(queue, id, execution)
  end
  num_claimed = num_claimed + 1
  call('HSET', record, 'id', execution, 'job_id', id, 'worker_name', worker, 'queue', queue, 'created_at', second,
    'last_heartbeat', second)
  call('EXPIRE', record, keep)
  call('EXPIRE', records, keep)
  call('HSET', key, 'status', 'started', 'started_at', now, 'last_heartbeat', now, 'worker_name', worker, 'origin', queue)
  call('PERSIST', key)
  all_pairs[num_claimed] = pair
  leases[#leases + 1] = lease_until
  leases[#leases + 1] = pair
  claimed[num_claimed + 2] = told(queue, id, execution, fields)
  bytes = bytes + math.max(data and #data or 0, BYTES_PER_TEXT * math.min(MAX_TEXTS, seconds(fields[4], 1)))
end

local looked = 0

-- Claims from the head of one list; false once enough is claimed.
local function drain(list, queue)
  while true do
    local ids = redis.call('LRANGE', list, 0, LOOK_AHEAD - 1)
    local taken = 0
    for _, id in ipairs(ids) do
      if num_claimed >= max_jobs or bytes >= max_bytes or looked >= MAX_LOOKS then
        break
      end
      claim(queue, id)
      looked = looked + 1
      taken = taken + 1
    end
    if taken > 0 then
      redis.call('LTRIM', list, taken, -1)
    end
    if taken < #ids then
      return false
    elseif #ids < LOOK_AHEAD then
      return true
    end
  end
end

local is_empty = true
for i = 5, #KEYS do
  local queue = ARGV[3 + i]
  is_empty = drain(KEYS[i], queue)
  in_slices(leases, function(...) redis.call('ZADD', wip_key(prefix, queue), ...) end)
  leases = {}
  if not is_empty then
    break
  end
end
if is_empty then
  claimed[2] = 'empty'
end

if num_claimed > 0 then
  in_slices(all_pairs, function(...) redis.call('SADD', KEYS[3], ...) end)
  redis.call('SET', KEYS[4], nonce, 'EX', 300)
  redis.call('EXPIRE', KEYS[3], keep)
  if redis.call('EXISTS', KEYS[2]) == 1 then
    redis.call('HSET', KEYS[2], 'state', 'busy')
  end
end
return claimed
