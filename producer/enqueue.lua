-- Puts many jobs on one queue, all of them or none.
--
-- KEYS[1]  the queue's list
-- KEYS[2]  the set of all queues
-- ARGV[1]  what precedes a job id in its key
-- ARGV[2]  'RPUSH' or 'LPUSH' (at the head; the first job of the call comes out first)
-- ARGV[3]  seconds until a waiting job vanishes, 0: never
-- ARGV[4]  n, the number of ARGVs that follow with the fields all jobs share: name, value, name, value, ...
-- then     job id, data, description, number of texts for each job
--
-- Returns the ids that are taken by a job with other data; if there is one, nothing was written. A job whose
-- id and data are there already is left as it is: the same call sent twice enqueues once.

local prefix, push, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3])
local shared = {}
for i = 1, tonumber(ARGV[4]) do
  shared[i] = ARGV[4 + i]
end
local first_job = 5 + #shared

local taken, fresh = {}, {}
for i = first_job, #ARGV, 4 do
  local data = redis.call('HGET', prefix .. ARGV[i], 'data')
  if not data and redis.call('EXISTS', prefix .. ARGV[i]) == 0 then
    fresh[#fresh + 1] = i
  elseif data ~= ARGV[i + 1] then
    taken[#taken + 1] = ARGV[i]
  end
end
if #taken > 0 then
  return taken
end

redis.call('SADD', KEYS[2], KEYS[1])
if push == 'LPUSH' then
  for left = 1, math.floor(#fresh / 2) do
    local right = #fresh + 1 - left
    fresh[left], fresh[right] = fresh[right], fresh[left]
  end
end
local now = timestamp()
for _, i in ipairs(fresh) do
  local key = prefix .. ARGV[i]
  redis.call('HSET', key, 'data', ARGV[i + 1], 'description', ARGV[i + 2], 'embedq_texts', ARGV[i + 3],
    'created_at', now, 'enqueued_at', now, unpack(shared))
  if ttl > 0 then
    redis.call('EXPIRE', key, ttl)
  end
  redis.call(push, KEYS[1], ARGV[i])
end
return taken
