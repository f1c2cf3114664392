-- Writes a worker's figures beside its name, and looks whether the fleet is suspended. A worker that Redis does not know
-- has no place for them: it registers again, and brings them along.
--
-- KEYS[1]  the worker's hash
-- KEYS[2]  the key that exists while `rq suspend` is in force
-- ARGV[1]  the figures; empty: nothing is to be written
--
-- Returns {whether Redis knows the worker 0|1, whether the fleet is suspended 0|1}.

clear_way('hash', KEYS[1])
local is_known = redis.call('HEXISTS', KEYS[1], 'birth')
if is_known == 1 and ARGV[1] ~= '' then
  redis.call('HSET', KEYS[1], 'embedq_figures', ARGV[1])
end
return {is_known, redis.call('EXISTS', KEYS[2])}
